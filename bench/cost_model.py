"""How often the path that `cost_model` chooses is within 15 % of the best measured one, over a grid of layers.

    python bench/cost_model.py [--shapes 200] [--threads 1] [--training] [--calibrate] [--save]

Every path of every shape is timed in turns; losing shapes are printed.
"""

import argparse
import itertools
import random

import harness
import torch

from tucker_kernels import calibrate, cost_model, tucker_conv

GRID = list(
    itertools.product(
        (1, 8, 32),  # batch
        (16, 32, 64, 128, 256, 512),  # channels
        (4, 7, 8, 14, 16, 28, 32),  # pixels a side
        (0.06, 0.125, 0.25, 0.5, 0.75, 1.0),  # rank over channels
        (1, 3),  # window
        (1, 2),  # stride
    )
)
MOST = 2e9  # operations of the dense convolution, so that the grid takes minutes


def shapes(count):
    found = []
    for batch, n, side, fraction, k, stride in random.Random(0).sample(GRID, len(GRID)):
        out, r = (side + 2 * (k // 2) - k) // stride + 1, max(1, round(n * fraction))
        conv = cost_model.Conv(*(batch, n, n, r, r), *((v, v) for v in (side, out, k, stride, k // 2, 1)))
        if cost_model.operations("reconstruct", conv) < MOST:
            found.append(conv)
    return found[:count]


def call(conv, path, training):
    x = torch.randn(conv.batch, conv.n_in, *conv.size).contiguous(memory_format=torch.channels_last)
    core = torch.randn(conv.r_out, conv.r_in, *conv.window)
    operands = [x, core, torch.randn(conv.n_out, conv.r_out), torch.randn(conv.n_in, conv.r_in)]
    for operand in operands:
        operand.requires_grad_(training)

    def run():
        x, core, *factors = operands
        y = tucker_conv(x, core, [*factors, None, None], None, conv.stride, conv.padding, path=path)
        if training:
            torch.autograd.grad(y, operands, y.detach())

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--calibrate", action="store_true", help="measure the machine's constants first")
    parser.add_argument("--save", action="store_true", help="write bench/results/cost_model.json")
    args = parser.parse_args()
    machine = calibrate.measure() if args.calibrate else None
    rows = []
    with harness.threads(args.threads):
        for conv in shapes(args.shapes):
            calls = {path: call(conv, path, args.training) for path in cost_model.PATHS}
            times = harness.compare(calls, repeats=args.repeats, min_time=0.0005)
            path = cost_model.choose(conv, training=args.training, threads=args.threads, machine=machine)
            best = min(times, key=times.get)
            layer = f"{conv.batch}×{conv.n_in}@{conv.size[0]}² r={conv.r_in} k={conv.window[0]} s={conv.stride[0]}"
            rows.append({"layer": layer, "chosen": path, "best": best, "chosen/best": times[path] / times[best]})
    lost = [row for row in rows if row["chosen/best"] > 1.15]
    if lost:
        harness.print_table(lost, title="more than 15 % slower than the best path")
    print(f"within 15 % of the best: {len(rows) - len(lost)} of {len(rows)}, {args.threads} threads")
    if args.save:
        print(harness.save("cost_model", rows, threads=args.threads, training=args.training))


if __name__ == "__main__":
    main()
