"""The linear algebra of one TDLRT step for all layers of a network: ours against the literal torch loop, and its floor.

    python bench/linear_algebra.py [--nets resnet18 vgg16] [--divisors 2 4 8] [--threads 1 2] [--repeats 5]

Literal (Algorithm 1 of arXiv 2305.19059, layer by layer, torch.linalg): QR of the core unfoldings, QR of [K|U],
projection of the core, SVD of the unfoldings, rotation. Ours: one `tangent_basis`, zero padding, one `hosvd_truncate`,
rotation. Both start from the same factors, core and gradients, add a core step of the same relative size and cut to the
old ranks at most. "cold" cores are random (full solves everywhere); "warm" ones are in HOSVD form with a decaying
spectrum before a small step, which is what training has. "more ranks" is how many columns more than the literal loop
ours keeps, over all modes, where the literal ranks are cut to what the other modes can use. The floor is the leading
floating-point operations of our algorithm at the measured GEMM rate.
"""

import argparse
import functools
import itertools
import math

import harness
import torch

import tucker_kernels as tk

TAU = 0.1


def resnet18():
    shapes = [(64, 3, 3, 3)] + [(64, 64, 3, 3)] * 4
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        shapes += [(outputs, inputs, 3, 3)] + [(outputs, outputs, 3, 3)] * 3 + [(outputs, inputs, 1, 1)]
    return shapes


def vgg16():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    return [(o, i, 3, 3) for i, o in itertools.pairwise(widths)]


NETS = {"resnet18": resnet18, "vgg16": vgg16}


def ranks_of(shape, divisor):
    return [max(1, n // divisor if n > 8 else n) for n in shape]


def unfold(core, mode):
    return core.movedim(mode, 0).reshape(core.shape[mode], -1)


def mode_dot(core, matrix, mode):
    return torch.tensordot(matrix, core, dims=([1], [mode])).movedim(0, mode)


class Layer:
    def __init__(self, shape, divisor, warm):
        self.ranks = ranks_of(shape, divisor)
        self.bases = [torch.linalg.qr(torch.randn(n, r))[0] for n, r in zip(shape, self.ranks)]
        core = torch.randn(self.ranks)
        if warm:
            for i, r in enumerate(self.ranks):
                core = core * torch.logspace(0, -1.5, r).reshape([-1] + [1] * (3 - i))
            (core,), _, _, _ = tk.hosvd_truncate([core.contiguous()], tol=0.0)
        self.core = core / core.norm()
        self.gradients = [torch.randn_like(u) for u in self.bases]
        grown = [min(2 * r, n) for r, n in zip(self.ranks, shape)]
        step = torch.randn(grown)
        self.step = step * ((1e-2 if warm else 0.3) / step.norm())


def literal(layers):
    """Returns the ranks found, layer by layer."""
    found = []
    for layer in layers:
        core, bases, lifts = layer.core, [], []
        for i, (U, gradient) in enumerate(zip(layer.bases, layer.gradients)):
            _, S = torch.linalg.qr(unfold(core, i).mT)
            K = U[:, : S.shape[0]] @ S if S.shape[0] != S.shape[1] else U @ S.mT
            if K.shape == gradient.shape:
                K = K - 1e-2 * gradient
            width = min(2 * U.shape[1], U.shape[0])
            bases.append(torch.linalg.qr(torch.cat([K, U], 1))[0][:, :width])
            lifts.append(bases[-1].mT @ U)
        for i in range(4):
            core = mode_dot(core, lifts[i], i)
        core = core + layer.step
        rotations = []
        for i in range(4):
            P, sigma, _ = torch.linalg.svd(unfold(core, i), full_matrices=False)
            tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
            rank = max(1, min(int((tail > TAU / 2 * torch.linalg.norm(sigma)).sum()), layer.ranks[i]))
            rotations.append(P[:, :rank])
        for i in range(4):
            core = mode_dot(core, rotations[i].mT, i)
            bases[i] = bases[i] @ rotations[i]
        found.append(list(core.shape))
    return found


def feasible(ranks):
    ranks = list(ranks)
    for i, r in enumerate(ranks):
        ranks[i] = min(r, math.prod(ranks) // r)
    return ranks


def augment(layers):
    bases = [u for layer in layers for u in layer.bases]
    found, counts = tk.tangent_basis(bases, [d for layer in layers for d in layer.gradients])
    return bases, found, counts.tolist()


def grow(layers, counts):
    """The cores zero-padded to the augmented bases, plus the step."""
    cores, sizes = [], iter(counts)
    for layer in layers:
        old = layer.core.shape
        core = torch.zeros([r + next(sizes) for r in old])
        core[tuple(slice(0, r) for r in old)] = layer.core
        cores.append(core.add_(layer.step[tuple(slice(0, s) for s in core.shape)]))
    return cores


def truncate(layers, cores):
    upper = [tuple(layer.ranks) for layer in layers]
    return tk.hosvd_truncate(cores, tol=TAU, max_rank=upper)


def ours(layers):
    bases, found, counts = augment(layers)
    cores = grow(layers, counts)
    _, projections, ranks, _ = truncate(layers, cores)
    at = iter(zip(bases, found, counts))
    for own, kept in zip(projections, ranks.tolist()):
        for P, r in zip(own, kept):
            U, V, k = next(at)
            torch.cat([U, V[:, :k]], 1) @ P[:, :r]
    return ranks.tolist()


def operations(layers):
    """Leading flops of our step: projections and Gram-Schmidt, Gram matrices (half), eigensolves, products."""
    total = {"basis": 0, "gram": 0, "solve": 0, "products": 0}
    for layer in layers:
        shape = layer.step.shape
        size = math.prod(shape)
        for u, a, r in zip(layer.bases, shape, layer.ranks):
            n, v = u.shape[0], a - u.shape[1]
            total["basis"] += 4 * n * u.shape[1] * v + 2 * n * v * v
            total["gram"] += size * a
            total["solve"] += 4 * a**3 / 3 + 2 * a * a * r + a**3
            total["products"] += 2 * n * a * r
        for i in sorted(range(4), key=lambda i: layer.ranks[i] / shape[i]):
            total["products"] += 2 * size * layer.ranks[i]
            size = size * layer.ranks[i] // shape[i]
    return total


def gemm_rate():
    """FLOP/s of our own GEMM, by a large mode product."""
    x, m = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / harness.compare({"gemm": lambda: tk.mode_dot(x, m, 0)}, repeats=7)["gemm"]


def measure(net, divisor, threads, repeats, against):
    torch.manual_seed(0)
    rows = []
    with torch.no_grad(), harness.threads(threads):
        rate = gemm_rate()
        for state in ("cold", "warm"):
            layers = [Layer(shape, divisor, state == "warm") for shape in NETS[net]()]
            _, _, counts = augment(layers)
            cores = grow(layers, counts)
            candidates = {
                "ours": functools.partial(ours, layers),
                "basis": functools.partial(augment, layers),
                "truncate": functools.partial(truncate, layers, cores),
            }
            if against:
                candidates["literal"] = functools.partial(literal, layers)
            times = harness.compare(candidates, repeats=repeats)
            floor = sum(operations(layers).values()) / rate
            row = {"net": net, "r": f"n/{divisor}", "cores": state, "threads": threads}
            row |= {f"{name} ms": 1e3 * t for name, t in times.items()}
            if against:
                row["speed-up"] = times["literal"] / times["ours"]
                kept = zip(literal(layers), ours(layers))
                row["more ranks"] = str(sorted({b - a for x, y in kept for a, b in zip(feasible(x), y)}))
            row["floor ms"] = 1e3 * floor
            row["ours/floor"] = times["ours"] / floor
            row["GEMM GFLOP/s"] = rate / 1e9
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18"], choices=sorted(NETS))
    parser.add_argument("--divisors", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-literal", action="store_true", help="do not run the torch loop")
    arguments = parser.parse_args()
    rows = []
    for net in arguments.nets:
        for divisor in arguments.divisors:
            for threads in arguments.threads:
                rows += measure(net, divisor, threads, arguments.repeats, not arguments.no_literal)
                harness.print_table(rows[-2:])
    harness.print_table(rows, title="linear algebra of one TDLRT step")
    print(harness.save("linear_algebra", rows))


if __name__ == "__main__":
    main()
