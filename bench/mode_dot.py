"""mode_dot and multi_mode_dot against torch.einsum, torch.tensordot and TensorLy; the GEMM against torch.matmul.

    python bench/mode_dot.py [--threads 1 2] [--quick]

Every candidate is checked against float64 before it is timed. A ratio is the other's time divided by ours: above 1
we are faster. Two numbers are kept for each shape: against the fastest of the others, and against the one they are
usually called for. TensorLy takes part where it is installed.
"""

import argparse
import string
import time

import harness
import torch

import tucker_kernels as tk
from tucker_kernels.native import native_module

try:
    import tensorly

    tensorly.set_backend("pytorch")
except ImportError:
    tensorly = None

# (name, shape, mode, rows, channels last)
MODE_DOTS = [
    (f"{name} {'x'.join(map(str, shape))} r={r}", shape, mode, r, last)
    for name, shape, mode, last, ranks in [
        ("first", (256, 4096), 0, False, (8, 16, 32, 64, 128)),
        ("last", (4096, 256), 1, False, (8, 16, 32, 64, 128)),
        ("middle", (64, 256, 64), 1, False, (8, 32, 128)),
        ("image", (32, 64, 32, 32), 1, False, (8, 16, 32)),
        ("image", (32, 256, 8, 8), 1, False, (32, 64, 128)),
        ("image", (32, 512, 4, 4), 1, False, (64, 128)),
        ("channels last", (32, 64, 32, 32), 1, True, (8, 16, 32)),
        ("channels last", (32, 256, 8, 8), 1, True, (32, 64, 128)),
        ("weight", (256, 256, 3, 3), 0, False, (32, 64, 128)),
        ("weight", (256, 256, 3, 3), 1, False, (32, 64, 128)),
        ("window", (128, 128, 3, 3), 3, False, (2,)),
        ("expand", (16, 4096), 0, False, (64, 128)),
        ("expand", (32, 64, 8, 8), 1, False, (128,)),
    ]
    for r in ranks
]

# (name, shape, modes, rows): projections of a weight, reconstruction of one, a linear layer with four modes
MULTI_MODE_DOTS = [
    ("project 64x64x3x3 r=16", (64, 64, 3, 3), (0, 1), (16, 16)),
    ("project 256x256x3x3 r=64", (256, 256, 3, 3), (0, 1), (64, 64)),
    ("project 512x512x3x3 r=128", (512, 512, 3, 3), (0, 1), (128, 128)),
    ("project 128x128x3x3 all modes", (128, 128, 3, 3), (0, 1, 2, 3), (32, 32, 2, 2)),
    ("reconstruct 64x64x3x3 r=16", (16, 16, 3, 3), (0, 1), (64, 64)),
    ("reconstruct 256x256x3x3 r=64", (64, 64, 3, 3), (0, 1), (256, 256)),
    ("reconstruct 512x512x3x3 r=128", (128, 128, 3, 3), (0, 1), (512, 512)),
    ("rows 512 of 16x32 r=8", (512, 16, 32), (1, 2), (8, 8)),
    ("rows 32 of 24x32 r=12", (32, 24, 32), (1, 2), (12, 12)),
    ("cube 96 r=16", (96, 96, 96), (0, 1, 2), (16, 16, 16)),
    ("cube 96 r=48", (96, 96, 96), (0, 1, 2), (48, 48, 48)),
]

GEMMS = [(m, n, k) for m, n, k in [(64,) * 3, (128,) * 3, (256,) * 3, (512,) * 3, (1024,) * 3]] + [
    (r, 4096, 256) for r in (8, 16, 32, 64, 128)
]


def mode_dot_candidates(x, m, mode):
    letters = string.ascii_lowercase[: x.ndim]
    equation = f"{letters},z{letters[mode]}->{letters.replace(letters[mode], 'z')}"
    candidates = {
        "ours": lambda: tk.mode_dot(x, m, mode),
        "einsum": lambda: torch.einsum(equation, x, m),
        "tensordot": lambda: torch.tensordot(m, x, dims=([1], [mode])).movedim(0, mode),
    }
    if tensorly is not None:
        candidates["tensorly"] = lambda: tensorly.tenalg.mode_dot(x, m, mode)
    return candidates


def multi_mode_dot_candidates(x, matrices, modes):
    letters, result, terms = string.ascii_lowercase[: x.ndim], string.ascii_lowercase[: x.ndim], []
    for mode in modes:
        terms.append(letters[mode].upper() + letters[mode])
        result = result.replace(letters[mode], letters[mode].upper())
    equation = f"{letters},{','.join(terms)}->{result}"

    def tensordots():
        y = x
        for m, mode in zip(matrices, modes):
            y = torch.tensordot(m, y, dims=([1], [mode])).movedim(0, mode)
        return y

    candidates = {
        "ours": lambda: tk.multi_mode_dot(x, matrices, modes=modes),
        "einsum": lambda: torch.einsum(equation, x, *matrices),
        "tensordot": tensordots,
    }
    if tensorly is not None:
        candidates["tensorly"] = lambda: tensorly.tenalg.multi_mode_dot(x, matrices, modes=modes)
    return candidates


def gemm_candidates(a, b):
    """The kernels alone, without the operator around ours: both write into memory that is there."""
    (m, k), n = a.shape, b.shape[1]
    ours, theirs = torch.empty(m, n), torch.empty(m, n)
    arguments = (0, b.data_ptr(), 1, k, n, a.data_ptr(), m, False, ours.data_ptr(), torch.get_num_threads())
    return {
        "ours": lambda held=(a, b, ours): native_module()[0].mode_dot_cpu(*arguments),  # arguments are addresses
        "matmul": lambda: torch.mm(a, b, out=theirs),
    }


def check(candidates, x, matrices, modes):
    expected = tk.multi_mode_dot(x.double(), [m.double() for m in matrices], modes=modes)
    for name, call in candidates.items():
        error = float((call().double() - expected).abs().max() / expected.abs().max())
        if not error < 1e-5:
            raise SystemExit(f"{name} is wrong by {error:.1e}")


def row_of(name, times, operations):
    others = {key: value for key, value in times.items() if key != "ours"}
    row = {"shape": name, "us": 1e6 * times["ours"], "GFLOP/s": operations / times["ours"] * 1e-9}
    row.update({key: value / times["ours"] for key, value in others.items()})
    row["best other"] = min(others.values()) / times["ours"]
    return row


def run(title, rows, threads):
    harness.print_table(rows, title=f"{title}, float32, {threads} threads; ratios above 1: ours is faster")
    for column in rows[0]:
        if column not in ("shape", "us", "GFLOP/s"):
            values = [row[column] for row in rows]
            mean, least = harness.geometric_mean(values), min(values)
            print(f"  {title}, {threads} threads, against {column}: geometric mean {mean:.2f}, least {least:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, not wall time (one thread, busy machine)"
    )
    arguments = parser.parse_args()
    options = {"repeats": 5, "min_time": 0.002} if arguments.quick else {}
    if arguments.cpu_time:
        options["clock"] = time.process_time
    saved = {}
    for threads in arguments.threads:
        with harness.threads(threads), torch.no_grad():
            rows = []
            for name, shape, mode, r, last in MODE_DOTS:
                x, m = torch.randn(shape), torch.randn(r, shape[mode])
                if last:
                    x = x.contiguous(memory_format=torch.channels_last)
                candidates = mode_dot_candidates(x, m, mode)
                check(candidates, x, [m], [mode])
                rows.append(row_of(name, harness.compare(candidates, **options), 2 * x.numel() * r))
            run("mode_dot", rows, threads)
            saved[f"mode_dot, {threads} threads"] = rows
            rows = []
            for name, shape, modes, ranks in MULTI_MODE_DOTS:
                x, matrices = torch.randn(shape), [torch.randn(r, shape[m]) for r, m in zip(ranks, modes)]
                candidates = multi_mode_dot_candidates(x, matrices, modes)
                check(candidates, x, matrices, modes)
                rows.append(row_of(name, harness.compare(candidates, **options), operations(shape, modes, ranks)))
            run("multi_mode_dot", rows, threads)
            saved[f"multi_mode_dot, {threads} threads"] = rows
            rows = []
            for m, n, k in GEMMS:
                candidates = gemm_candidates(torch.randn(m, k), torch.randn(k, n))
                rows.append(row_of(f"{m}x{n}x{k}", harness.compare(candidates, **options), 2 * m * n * k))
            run("gemm", rows, threads)
            saved[f"gemm, {threads} threads"] = rows
    print("written to", harness.save("mode_dot", saved, clock="cpu" if arguments.cpu_time else "wall"))


def operations(shape, modes, ranks):
    """Multiply-adds times two of the chain in the cheapest order."""
    from tucker_kernels.reference import mode_order

    sizes, total = list(shape), 0
    for k in mode_order(shape, [(r, shape[m]) for r, m in zip(ranks, modes)], modes, False):
        total += 2 * torch.Size(sizes).numel() * ranks[k]
        sizes[modes[k]] = ranks[k]
    return total


if __name__ == "__main__":
    main()
