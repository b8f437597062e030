"""Tucker convolutions on the CPU: the fused kernel and the chosen path against what one would write instead.

    python bench/tucker_conv.py [--threads 1 2] [--dtype float32] [--batch 32] [--repeats 9] [--save]

Rivals: three `F.conv2d` calls (1×1 → core → 1×1) in both memory formats, one dense `F.conv2d` in both, and
tltorch's factorized `FactorizedConv` where that package is installed. Shapes: the 3×3 layers of ResNet18 on 32×32
images at r = n/2, n/4, n/8. Ratios are rival time over ours, so more is better; GFLOP/s counts the operations of
the chain with every tap, ours does fewer at the border of an image.
"""

import argparse
import math

import harness
import torch

import tucker_kernels

F = torch.nn.functional
LAYERS = [(64, 32), (128, 16), (256, 8), (512, 4)]
DIVISORS = (2, 4, 8)


def candidates(n, size, r, batch, dtype):
    """{name: (function of the input, input, parameters)}."""
    x = torch.randn(batch, n, size, size, dtype=dtype)
    core = torch.randn(r, r, 3, 3, dtype=dtype) / math.sqrt(9 * r)
    u_out = torch.randn(n, r, dtype=dtype) / math.sqrt(r)
    u_in = torch.randn(n, r, dtype=dtype) / math.sqrt(n)
    dense = torch.randn(n, n, 3, 3, dtype=dtype) / math.sqrt(9 * n)
    last = torch.channels_last
    found = {}
    for path in ("fused", "auto"):
        found[path] = (
            lambda x, c, o, i, path=path: tucker_kernels.tucker_conv(x, c, [o, i, None, None], padding=1, path=path),
            x.to(memory_format=last),
            [core, u_out, u_in],
        )
    for name, memory in (("", torch.contiguous_format), (" last", last)):
        image = x.contiguous(memory_format=memory)
        weights = [u_in.T[:, :, None, None], core, u_out[:, :, None, None]]
        found["chain" + name] = (
            lambda x, i, c, o: F.conv2d(F.conv2d(F.conv2d(x, i), c, padding=1), o),
            image,
            [w.contiguous(memory_format=memory) for w in weights],
        )
        found["dense" + name] = (
            lambda x, w: F.conv2d(x, w, padding=1),
            image,
            [dense.contiguous(memory_format=memory)],
        )
    try:
        import tltorch
    except ImportError:
        return found
    layer = tltorch.FactorizedConv(
        *(n, n),
        kernel_size=3,
        order=2,
        padding=1,
        bias=False,
        rank=(r, r, 3, 3),
        factorization="tucker",
        implementation="factorized",
    ).to(dtype)
    layer.reset_parameters()
    found["tltorch"] = (lambda x, *_: layer(x), x, list(layer.parameters()))
    return found


def forward(function, x, parameters):
    def call():
        with torch.no_grad():
            function(x, *parameters)

    return call


def forward_backward(function, x, parameters):
    x = x.detach().requires_grad_()
    parameters = [p if isinstance(p, torch.nn.Parameter) else p.detach().requires_grad_() for p in parameters]
    grad = torch.randn_like(function(x, *parameters).detach())
    return lambda: torch.autograd.grad(function(x, *parameters), [x, *parameters], grad)


def measure(n, size, r, batch, dtype, repeats):
    pixels = batch * size * size
    flops = 2 * pixels * (2 * n * r + 9 * r * r)
    row = {"layer": f"{n}@{size}² r={r}"}
    cases = candidates(n, size, r, batch, dtype)
    for tag, wrap, passes in (("f", forward, 1), ("f+b", forward_backward, 3)):
        times = harness.compare({name: wrap(*case) for name, case in cases.items()}, repeats=repeats)
        best = {kind: min(t for name, t in times.items() if name.startswith(kind)) for kind in ("chain", "dense")}
        ours = times["fused"]
        row |= {
            f"{tag} ms": 1e3 * ours,
            f"{tag} GFLOP/s": passes * flops / ours / 1e9,
            f"{tag} chain": best["chain"] / ours,
            f"{tag} dense": best["dense"] / ours,
        }
        if "tltorch" in times:
            row[f"{tag} tltorch"] = times["tltorch"] / ours
        row[f"{tag} best/auto"] = min(ours, best["chain"], best["dense"]) / times["auto"]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", type=int, nargs="+", default=range(len(LAYERS)))
    parser.add_argument("--save", action="store_true", help="write bench/results/tucker_conv.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    saved = []
    for threads in args.threads:
        with harness.threads(threads):
            rows = [
                measure(*LAYERS[i], LAYERS[i][0] // d, args.batch, getattr(torch, args.dtype), args.repeats)
                for i in args.layers
                for d in DIVISORS
            ]
        harness.print_table(rows, title=f"{args.dtype}, {threads} threads, batch {args.batch}")
        for key in rows[0]:
            if key.endswith(("chain", "dense", "tltorch", "auto")):
                means = [harness.geometric_mean(row[key] for row in rows[i::3]) for i in range(3)]
                print(
                    f"  {key}: " + ", ".join(f"n/{d} {m:.2f}" for d, m in zip(DIVISORS, means)),
                    f"all {harness.geometric_mean(row[key] for row in rows):.2f}",
                    f"worst {min(row[key] for row in rows):.2f}",
                )
        saved += [{"threads": threads, "dtype": args.dtype, "batch": args.batch, **row} for row in rows]
    if args.save:
        print(harness.save("tucker_conv", saved))


if __name__ == "__main__":
    main()
