"""Tucker linear layers on the CPU against tltorch, a dense layer and plain torch: forward and backward.

    python bench/tucker_linear.py [--threads 1] [--repeats 15] [--cpu-time] [--save]

Two and four modes of a 512 × 512 layer, and larger ones, with 32 and 512 rows. Ratios are the rival's time over ours.
tltorch takes part where it is installed (`pip install -e '.[bench]'`): its factorized layer, whose einsum opt_einsum
puts in order.
"""

import argparse
import importlib.util
import math
import time

import harness
import torch

import tucker_kernels

CASES = [
    ((512,), (512,), (64, 64)),
    ((1024,), (1024,), (128, 128)),
    ((16, 32), (16, 32), (8, 16, 8, 16)),
    ((24, 32), (24, 32), (12, 12, 12, 12)),
    ((32, 32), (32, 32), (16, 16, 16, 16)),
]
MISSING = [name for name in ("tltorch", "opt_einsum") if importlib.util.find_spec(name) is None]


def candidates(outer, inner, ranks):
    """{name: (function, parameters)} of the same input."""
    full, out_modes = (*outer, *inner), len(outer)
    core = torch.randn(ranks) / math.sqrt(math.prod(ranks))
    factors = [torch.randn(n, r) / math.sqrt(n) for n, r in zip(full, ranks)]
    n_out, n_in = math.prod(outer), math.prod(inner)
    bias = torch.zeros(n_out)

    def ours(x, core, bias, *factors):
        return tucker_kernels.tucker_linear(x, core, list(factors), bias, out_modes)

    found = {
        "ours": (ours, [core, bias, *factors]),
        "dense": (torch.nn.functional.linear, [torch.randn(n_out, n_in), bias]),
    }
    if out_modes == 1:
        found["torch"] = (lambda x, c, b, u, v: x @ v @ c.T @ u.T + b, [core, bias, *factors])
    if MISSING:
        return found
    import tltorch

    layer = tltorch.FactorizedLinear(
        inner, outer, bias=True, factorization="tucker", rank=ranks, implementation="factorized"
    )
    layer.reset_parameters()
    found["tltorch"] = (lambda x, *_: layer(x), list(layer.parameters()))
    return found


def call(function, x, parameters):
    x = x.clone().requires_grad_()
    parameters = [p if isinstance(p, torch.nn.Parameter) else p.requires_grad_() for p in parameters]
    grad = torch.randn_like(function(x, *parameters).detach())
    return lambda: torch.autograd.grad(function(x, *parameters), [x, *parameters], grad)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, not wall time (one thread, busy machine)"
    )
    parser.add_argument("--save", action="store_true", help="write bench/results/tucker_linear.json")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if MISSING:
        print(f"no rows for tltorch: {' and '.join(MISSING)} not installed; pip install -e '.[bench]'")
    torch.manual_seed(0)
    saved = []
    for threads in args.threads:
        for outer, inner, ranks in CASES:
            table = []
            for rows in (32, 512):
                x = torch.randn(rows, math.prod(inner))
                with harness.threads(threads):
                    cases = {name: call(f, x, p) for name, (f, p) in candidates(outer, inner, ranks).items()}
                    times = harness.compare(cases, repeats=args.repeats, clock=clock)
                row = {"layer": f"{outer} × {inner} r={ranks}", "rows": rows, "ours µs": 1e6 * times["ours"]}
                table.append(row | {name: t / times["ours"] for name, t in times.items() if name != "ours"})
            harness.print_table(table, title=f"float32, {threads} threads")
            saved += [{"threads": threads, **row} for row in table]
    if args.save:
        print(harness.save("tucker_linear", saved, clock="cpu" if args.cpu_time else "wall"))


if __name__ == "__main__":
    main()
