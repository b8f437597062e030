"""The linear algebra of one TDLRT step for all layers of a network: ours against the literal torch loop, and its floor.

    python bench/linear_algebra.py [--nets resnet18 vgg16] [--divisors 2 4 8] [--threads 1 2] [--repeats 5]

Rows of "step": ours is one `tangent_basis`, [U|V], zero padding, one `hosvd_truncate`, one `rotate_bases`; literal is
Algorithm 1 of arXiv 2305.19059 with torch.linalg, layer by layer. Both start from the same factors, core and gradients,
add a core step of the same relative size and cut to the old ranks at most. "cold" cores are random (full solves
everywhere); "warm" ones are in HOSVD form with a decaying spectrum before a small step; "training" ones are what the
fourth step of bench/training_step.py truncates (one_pass, fixed ranks, channel modes, flat spectra). "more ranks" is
how many columns more than the literal loop ours keeps, over all modes, where the literal ranks are cut to what the
other modes can use. The floor is the leading floating-point operations of our algorithm at the measured GEMM rate; the
training rows need fewer, because they take no solves.
Rows of "augmented BUG": what RobustDLRT's augmentation and truncation do (channel modes, core and Adam's moments).
Rows of "from_dense": dense kernels to Tucker, all in one call, against SVDs by torch and one run of
TensorLy; where that is not installed the row says so.
Results go to bench/results/linear_algebra.json; with --keep, beside what is there and was not
measured again, whose rows then name their own commit and date.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import time
from dataclasses import dataclass

import harness
import step_rivals
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


@dataclass
class Layer:
    modes: tuple
    ranks: list  # of `modes`
    bases: list
    core: torch.Tensor
    gradients: list
    step: torch.Tensor
    fixed: bool = False  # ranks are kept, not chosen by TAU
    moments: tuple = ()

    @classmethod
    def random(cls, shape, divisor, warm, modes=(0, 1, 2, 3)):
        ranks = [r if i in modes else n for i, (n, r) in enumerate(zip(shape, ranks_of(shape, divisor)))]
        bases = [torch.linalg.qr(torch.randn(shape[i], ranks[i]))[0].contiguous() for i in modes]  # as steps leave them
        core = torch.randn(ranks)
        if warm:
            for i in modes:
                core = core * torch.logspace(0, -1.5, ranks[i]).reshape([-1] + [1] * (3 - i))
            (core,), _, _, _ = tk.hosvd_truncate([core.contiguous()], tol=0.0, modes=modes)
        grown = [min(2 * r, n) if i in modes else r for i, (r, n) in enumerate(zip(ranks, shape))]
        step = torch.randn(grown)
        step *= (1e-2 if warm else 0.3) / step.norm()
        gradients = [torch.randn_like(u) for u in bases]
        moments = torch.randn(ranks), torch.rand(ranks)
        return cls(modes, [ranks[i] for i in modes], bases, core / core.norm(), gradients, step, moments=moments)


def training_layers(net, divisor):
    """What the fourth training step of bench/training_step.py hands to the kernels."""
    import tdlrt
    import training_step
    from tdlrt import models

    dense = models.build(net, (3, 32, 32), 10, (0.0,) * 3, (1.0,) * 3)
    with torch.enable_grad():
        model = tdlrt.tuckerize(dense, ranks=1 / divisor).to(memory_format=torch.channels_last)
        optimizer = tdlrt.TDLRT(model, lr=training_step.LR, momentum=0.9, tol=None)
        images, labels = training_step.batch(8)
        seen, originals = {}, (tk.tangent_basis, tk.hosvd_truncate)

        def spy(name, function, *arguments, **options):
            seen[name] = arguments, options
            return function(*arguments, **options)

        tk.tangent_basis, tk.hosvd_truncate = (functools.partial(spy, f.__name__, f) for f in originals)
        try:
            for _ in range(4):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        finally:
            tk.tangent_basis, tk.hosvd_truncate = originals
    (bases, gradients), _ = seen["tangent_basis"]
    (cores,), options = seen["hosvd_truncate"]
    pairs = zip(bases, gradients, strict=True)
    layers = []
    for core, modes in zip(cores, options["modes"], strict=True):
        own, directions = zip(*itertools.islice(pairs, len(modes)))
        corner = tuple(slice(0, own[modes.index(i)].shape[1] if i in modes else n) for i, n in enumerate(core.shape))
        # Of the full augmented size, also where a direction depended on others and was dropped.
        sizes = [
            min(2 * own[modes.index(i)].shape[1], own[modes.index(i)].shape[0]) if i in modes else n
            for i, n in enumerate(core.shape)
        ]
        step = torch.zeros(sizes)
        step[tuple(slice(0, n) for n in core.shape)] = core
        step[corner] = 0
        ranks = [u.shape[1] for u in own]
        layers.append(Layer(tuple(modes), ranks, list(own), core[corner].clone(), list(directions), step, fixed=True))
    return layers


def feasible(ranks):
    ranks = list(ranks)
    for i, r in enumerate(ranks):
        ranks[i] = min(r, math.prod(ranks) // r)
    return ranks


def augment(layers):
    """[U|V] of every layer and mode, by layer."""
    bases = [u for layer in layers for u in layer.bases]
    found, counts = tk.tangent_basis(bases, [d for layer in layers for d in layer.gradients])
    grown = iter([torch.cat([U, V[:, :k]], 1) for U, V, k in zip(bases, found, counts.tolist())])
    return [list(itertools.islice(grown, len(layer.modes))) for layer in layers]


def grow(layers, bases, tensors=None, step=True):
    """The cores (or other tensors of their shape) zero-padded to the augmented bases, plus the step."""
    cores = []
    for layer, own, tensor in zip(layers, bases, tensors or [layer.core for layer in layers]):
        sizes = list(tensor.shape)
        for i, b in zip(layer.modes, own):
            sizes[i] = b.shape[1]
        core = torch.zeros(sizes)
        core[tuple(slice(0, r) for r in tensor.shape)] = tensor
        cores.append(core.add_(layer.step[tuple(slice(0, s) for s in sizes)]) if step else core)
    return cores


def truncate(layers, cores, mode="global"):
    ranks = [tuple(c.shape) for c in cores]
    for k, layer in enumerate(layers):
        small = dict(zip(layer.modes, layer.ranks))
        ranks[k] = tuple(small.get(i, n) for i, n in enumerate(ranks[k]))
    rule = {"ranks": ranks} if layers[0].fixed else {"tol": TAU, "max_rank": ranks, "tolerance_mode": mode}
    return tk.hosvd_truncate(cores, modes=[layer.modes for layer in layers], **rule)


def rotate(layers, bases, projections, ranks):
    """(rotated bases, the projections used), flat."""
    used = [P[i][:, : r[i]] for layer, P, r in zip(layers, projections, ranks) for i in layer.modes]
    return tk.rotate_bases([b for own in bases for b in own], used), used


def ours(layers):
    bases = augment(layers)
    _, projections, ranks, _ = truncate(layers, grow(layers, bases))
    rotate(layers, bases, projections, ranks.tolist())
    return [r[: layer.core.ndim] for layer, r in zip(layers, ranks.tolist())]


def ours_with_moments(layers):
    bases = augment(layers)
    _, projections, ranks, _ = truncate(layers, grow(layers, bases), "per_mode")
    _, used = rotate(layers, bases, projections, ranks.tolist())
    for k, square in enumerate((False, True)):
        moments = grow(layers, bases, [layer.moments[k] for layer in layers], step=False)
        for tensor, U, V in zip(moments, used[::2], used[1::2]):
            matrices = [U * U, V * V, None, None] if square else [U, V, None, None]
            tk.multi_mode_dot(tensor, matrices, transpose=True)


def operations(layers):
    """Leading flops of our step: projections and Gram-Schmidt, Gram matrices (half), eigensolves, products."""
    total = {"basis": 0, "gram": 0, "solve": 0, "products": 0}
    for layer in layers:
        size = math.prod(layer.step.shape)
        sizes = [layer.step.shape[i] for i in layer.modes]
        for u, a, r in zip(layer.bases, sizes, layer.ranks):
            n, v = u.shape[0], a - u.shape[1]
            total["basis"] += 4 * n * u.shape[1] * v + 2 * n * v * v
            total["gram"] += size * a
            total["solve"] += 0 if layer.fixed else 4 * a**3 / 3 + 2 * a * a * r + a**3
            total["products"] += 2 * n * a * r + 3 * n * r * r
        for r, a in sorted(zip(layer.ranks, sizes), key=lambda pair: pair[0] / pair[1]):
            total["products"] += 2 * size * r
            size = size * r // a
    return total


def gemm_rate():
    """FLOP/s of our own GEMM, by a large mode product."""
    x, m = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / harness.compare({"gemm": lambda: tk.mode_dot(x, m, 0)}, repeats=7)["gemm"]


def step_rows(net, divisor, options, rate):
    for state in options.cores:
        if state == "training":
            layers = training_layers(net, divisor)
        else:
            layers = [Layer.random(shape, divisor, state == "warm") for shape in NETS[net]()]
        bases = augment(layers)
        cores = grow(layers, bases)
        candidates = {
            "ours": functools.partial(ours, layers),
            "basis": functools.partial(augment, layers),
            "truncate": functools.partial(truncate, layers, cores),
        }
        if not options.no_literal:
            candidates["rival"] = functools.partial(step_rivals.literal, layers, TAU)
        times = harness.compare(candidates, repeats=options.repeats)
        floor = sum(operations(layers).values()) / rate
        row = {"what": "step", "cores": state, **_times(times)}
        if not options.no_literal:
            kept = zip(step_rivals.literal(layers, TAU), ours(layers))
            row["more ranks"] = str(sorted({b - a for x, y in kept for a, b in zip(feasible(x), y)}))
        yield row | {"floor ms": 1e3 * floor, "ours/floor": times["ours"] / floor}


def augmented_bug_row(net, divisor, options):
    shapes = [s for s in NETS[net]() if s[1] > 3 and s[2] == 3]  # the 3×3 layers with channels to cut
    layers = [Layer.random(shape, divisor, False, modes=(0, 1)) for shape in shapes]
    candidates = {
        "ours": functools.partial(ours_with_moments, layers),
        "rival": functools.partial(step_rivals.augmented_bug, layers, TAU),
    }
    return {"what": "augmented BUG", "cores": "cold", **_times(harness.compare(candidates, repeats=options.repeats))}


def from_dense_rows(net, divisor):
    weights = [torch.randn(s) / math.prod(s[1:]) ** 0.5 for s in NETS[net]()]
    ranks = [tuple(ranks_of(w.shape, divisor)[:2]) for w in weights]
    full = [(*r, *w.shape[2:]) for w, r in zip(weights, ranks)]

    def svds():
        for w, r in zip(weights, ranks):
            P = [torch.linalg.svd(step_rivals.unfold(w, i), full_matrices=False)[0][:, :k] for i, k in enumerate(r)]
            step_rivals.mode_dot(step_rivals.mode_dot(w, P[0].mT, 0), P[1].mT, 1)

    def decompose():
        return tk.hosvd_truncate(weights, ranks=full, modes=(0, 1))

    place = {"what": "from_dense / SVDs", "cores": "dense"}
    yield place | _times(harness.compare({"ours": decompose, "rival": svds}, repeats=3))
    place["what"] = "from_dense / TensorLy"
    if importlib.util.find_spec("tensorly") is None:
        yield place | {"cores": "not run: tensorly is not installed"}
        return
    times = harness.compare({"ours": decompose}, repeats=3)
    start = time.perf_counter()
    step_rivals.tensorly_tucker(weights, ranks)  # once: it takes many seconds
    yield place | _times(times | {"rival": time.perf_counter() - start})


def _times(times):
    found = {f"{name} ms": 1e3 * t for name, t in times.items()}
    return found | ({"speed-up": times["rival"] / times["ours"]} if "rival" in times else {})


COLUMNS = ("net", "r", "threads", "what", "cores", "ours ms", "basis ms", "truncate ms", "rival ms", "speed-up")
COLUMNS += ("more ranks", "floor ms", "ours/floor")


def measure(net, divisor, threads, options):
    torch.manual_seed(0)
    with torch.no_grad(), harness.threads(threads):
        rate = gemm_rate()
        rows = list(step_rows(net, divisor, options, rate)) if options.cores else []
        if "augmented-bug" in options.rivals:
            rows.append(augmented_bug_row(net, divisor, options))
        if "from-dense" in options.rivals:
            rows += from_dense_rows(net, divisor)
    place = {"net": net, "r": f"n/{divisor}", "threads": threads}
    rows = [place | row for row in rows]
    return [{key: row.get(key, "") for key in COLUMNS} | {"GEMM GFLOP/s": rate / 1e9} for row in rows]


def _place(row):
    return [row.get(key) for key in ("net", "r", "threads", "what", "cores")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18"], choices=sorted(NETS))
    parser.add_argument("--divisors", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=5)
    kinds = ("cold", "warm", "training")
    parser.add_argument("--cores", nargs="*", default=kinds, choices=kinds, help="of the rows of a step")
    others = ("augmented-bug", "from-dense")
    parser.add_argument("--rivals", nargs="*", default=(), choices=others, help="further rows")
    parser.add_argument("--no-literal", action="store_true", help="do not run the torch loop")
    parser.add_argument("--keep", action="store_true", help="add to the rows that the result file has")
    options = parser.parse_args()
    rows = []
    for net, divisor, threads in itertools.product(options.nets, options.divisors, options.threads):
        rows += measure(net, divisor, threads, options)
    harness.print_table(rows, title="linear algebra of one TDLRT step")
    path = harness.result_path("linear_algebra")
    if options.keep and path.exists():
        before = json.loads(path.read_text())
        made = {key: before["machine"][key] for key in ("commit", "date")}
        new = [_place(row) for row in rows]
        rows = [row if "commit" in row else made | row for row in before["rows"] if _place(row) not in new] + rows
    print(harness.save("linear_algebra", rows))


if __name__ == "__main__":
    main()
