"""How often the path that `cost_model` chooses is within 15 % of the best measured one, over a grid of layers.

    python bench/cost_model.py [--shapes 200] [--threads 1 2] [--dtype float32] [--save]   measures, then judges
    python bench/cost_model.py --saved [--calibrate]     judges the saved measurements, by newly measured constants
    python bench/cost_model.py --fit                     fits constants to half of them and judges both halves

Every path of every shape is timed in turns, forward and forward with backward; losing shapes are printed. Shapes are a
fixed random sample of the grid; none of them is one of `calibrate.LAYERS`.
"""

import argparse
import itertools
import json
import random

import harness
import torch

from tucker_kernels import calibrate, cost_model

GRID = list(
    itertools.product(
        (1, 8, 32),  # batch
        (16, 32, 64, 128, 256, 512),  # input channels
        (1, 2),  # output channels over input channels
        (4, 7, 8, 14, 16, 28, 32),  # pixels a side
        (0.06, 0.125, 0.25, 0.5, 0.75, 1.0),  # rank over channels
        (1, 3),  # window
        (1, 2),  # stride
    )
)
MOST = 2e9  # operations of the dense convolution, so that the grid takes minutes
TOLERANCE = 1.15


def shapes(count):
    found = []
    for batch, n, widening, side, fraction, k, stride in random.Random(0).sample(GRID, len(GRID)):
        out, r = (side + 2 * (k // 2) - k) // stride + 1, max(1, round(n * fraction))
        sizes = ((v, v) for v in (side, out, k, stride, k // 2, 1))
        conv = cost_model.Conv(batch, n * widening, n, r * widening, r, *sizes)
        if cost_model.operations("reconstruct", conv) < MOST:
            found.append(conv)
    return found[:count]


def measure(dtype, threads, training, count, repeats):
    """A setting and, per layer, the microseconds of every path in the order of `PATHS`."""
    layers = {}
    with harness.threads(threads):
        for conv in shapes(count):
            calls = {
                path: calibrate.layer_run(path, conv, getattr(torch, dtype), training) for path in cost_model.PATHS
            }
            times = harness.compare(calls, repeats=repeats, min_time=0.0005)
            layers[_name(conv)] = " ".join(f"{1e6 * times[path]:.4g}" for path in cost_model.PATHS)
    return {"dtype": dtype, "threads": threads, "training": training, "layers": layers}


def _name(conv):
    sizes = f"{conv.batch}×{conv.n_in}→{conv.n_out}@{conv.size[0]}²"
    return f"{sizes} r={conv.r_in}→{conv.r_out} k={conv.window[0]} s={conv.stride[0]}"


def _setting(group):
    return {key: group[key] for key in ("dtype", "threads", "training")}


def _measurements(group):
    """(layer, {path: seconds}) of all layers in a group of measurements."""
    known = {_name(conv): conv for conv in shapes(None)}
    for name, times in group["layers"].items():
        yield known[name], {path: 1e-6 * float(t) for path, t in zip(cost_model.PATHS, times.split())}


def _seen(conv):
    """The layer as `tucker_conv` chooses for it: without the pixels that a 1×1 window steps over."""
    return conv._replace(size=conv.out_size, stride=(1, 1)) if max(conv.window) == 1 else conv


def judge(groups, machine=None, part=slice(None)):
    """Prints, per setting, how many layers the choice serves well, and those that it does not."""
    for group in groups:
        lost, measured = [], list(_measurements(group))[part]
        for conv, times in measured:
            path = cost_model.choose(_seen(conv), machine=machine, **_setting(group))
            best = min(times, key=times.get)
            if times[path] > TOLERANCE * times[best]:
                layer = {"layer": _name(conv), "best µs": 1e6 * times[best], "chosen": path, "best": best}
                lost.append(layer | {"chosen/best": times[path] / times[best]})
        well = len(measured) - len(lost)
        title = f"{_setting(group)}: within 15 % of the best {well} of {len(measured)} ({well / len(measured):.1%})"
        harness.print_table(lost, title=title) if lost else print("\n" + title)


def fit(groups):
    """Fits the constants to every other layer and judges both halves."""
    machine = dict(cost_model.DEFAULTS)
    for dtype in sorted({group["dtype"] for group in groups}):
        samples = [
            (path, _seen(conv), group["training"], group["threads"], seconds)
            for group in groups
            if group["dtype"] == dtype
            for conv, times in list(_measurements(group))[::2]
            for path, seconds in times.items()
        ]
        machine[dtype] = calibrate.fit(samples, dtype)
        print(dtype, *(f"{path} {rates}" for path, rates in machine[dtype].items()), sep="\n  ")
    for part, name in enumerate(("fitted", "held out")):
        print(f"\n{name}")
        judge(groups, machine, slice(part, None, 2))


def _results():
    return harness.RESULTS / "cost_model.json"


def _saved():
    return json.loads(_results().read_text())["rows"] if _results().exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="float32", choices=sorted(cost_model.DEFAULTS))
    parser.add_argument("--training", type=int, nargs="+", default=[0, 1], help="0 forward, 1 forward and backward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fit", action="store_true", help="fit the constants to the saved measurements instead")
    parser.add_argument("--saved", action="store_true", help="judge the saved measurements instead")
    parser.add_argument("--calibrate", action="store_true", help="judge by constants that are measured first")
    parser.add_argument("--save", action="store_true", help="add to bench/results/cost_model.json")
    args = parser.parse_args()
    if args.fit:
        return fit(_saved())
    machine = calibrate.measure() if args.calibrate else None
    if args.saved:
        return judge(_saved(), machine)
    groups = [
        measure(args.dtype, threads, bool(training), args.shapes, args.repeats)
        for threads, training in itertools.product(args.threads, args.training)
    ]
    judge(groups, machine)
    if args.save:
        settings = [_setting(group) for group in groups]
        kept = [group for group in _saved() if _setting(group) not in settings]
        print(harness.save("cost_model", kept + groups))


if __name__ == "__main__":
    main()
