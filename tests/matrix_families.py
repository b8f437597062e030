"""Named hard cases for orthonormalisation and truncation, in float64; tests round them to the dtype they need."""

import math

import torch
from oracles import unfold


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(n, r, seed=0):
    return torch.linalg.qr(gaussian(n, r, seed=seed))[0].contiguous()  # else column-major


def with_singular_values(n, m, sigma, seed=0):
    k = len(sigma)
    return orthonormal(n, k, seed) * torch.as_tensor(sigma, dtype=torch.float64) @ orthonormal(m, k, seed + 1).T


def geometric(n, m, last, seed=0):
    return with_singular_values(n, m, torch.logspace(0, math.log10(last), min(n, m)), seed)


def kahan(n, m, angle=1.2):
    """Triangular with slowly shrinking pivots: no column looks dependent on those before it."""
    s, c = math.sin(angle), math.cos(angle)
    full = torch.eye(n, m, dtype=torch.float64)
    full[:m, :m] -= c * torch.ones(m, m, dtype=torch.float64).triu(1)
    return torch.tensor([s**i for i in range(n)], dtype=torch.float64)[:, None] * full


def vandermonde(n, m):
    return torch.linspace(0.1, 1, n, dtype=torch.float64)[:, None] ** torch.arange(m, dtype=torch.float64)


def near_duplicates(n, m, distance, seed=0):
    """Every column is the one before it plus a small step."""
    return gaussian(n, 1, seed=seed) + distance * gaussian(n, m, seed=seed + 1).cumsum(1)


def tangent_problems():
    """name → (U, D, how many columns must be found or None where rounding decides)."""
    n, r, p = 96, 24, 20
    U = orthonormal(n, r, 1)
    inside = gaussian(r, p, seed=2)
    half = gaussian(n, p // 2, seed=3)
    scaled = gaussian(n, p, seed=4)
    scaled[:, 3] *= 1e-20
    denormal = gaussian(n, p, seed=5)
    denormal[:, 0] *= 1e-33
    denormal[:, 7] *= 1e-42
    return {
        "gaussian": (U, gaussian(n, p, seed=6), p),
        "condition 1e-2": (U, geometric(n, p, 1e-2, 7), p),
        "condition 1e-4": (U, geometric(n, p, 1e-4, 8), None),
        "condition 1e-6": (U, geometric(n, p, 1e-6, 9), None),
        "condition 1e-8": (U, geometric(n, p, 1e-8, 10), None),
        "half dependent": (U, torch.cat([half, half.flip(1) * 3], 1), p // 2),
        "one column often": (U, half[:, :1].repeat(1, p), 1),
        "zero": (U, torch.zeros(n, p, dtype=torch.float64), 0),
        "inside U": (U, U @ inside, 0),
        "nearly inside U": (U, U @ inside + 1e-3 * gaussian(n, p, seed=11), p),
        "more than fit": (orthonormal(40, 24, 12), gaussian(40, 24, seed=13), 16),
        "no room": (orthonormal(24, 24, 14), gaussian(24, 24, seed=15), 0),
        "kahan": (U, kahan(n, p), None),
        "vandermonde": (U, vandermonde(n, p), None),
        "near duplicates 1e-2": (U, near_duplicates(n, p, 1e-2, 16), p),
        "near duplicates 1e-5": (U, near_duplicates(n, p, 1e-5, 17), None),
        "one tiny column": (U, scaled, p),
        "denormal columns": (U, denormal, p - 2),
        "no basis": (U[:, :0], gaussian(n, p, seed=18), p),
        "no directions": (U, U[:, :0], 0),
        "one row": (torch.zeros(1, 0, dtype=torch.float64), gaussian(1, 2, seed=19), 1),
        "window": (orthonormal(3, 2, 20), gaussian(3, 2, seed=21), 1),
        "wide": (orthonormal(300, 70, 22), gaussian(300, 75, seed=23), 75),
        "kept ones far from where they go": (
            orthonormal(150, 10, 24),
            torch.cat([gaussian(150, 1, seed=25).repeat(1, 70), gaussian(150, 30, seed=26)], 1),
            31,
        ),
    }


def _spectrum_core(shape, values, seed):
    """A core whose modes all have the decay `values(n)`, in random bases."""
    core = gaussian(*shape, seed=seed)
    for i, n in enumerate(shape):
        core = core * values(n).reshape([-1] + [1] * (len(shape) - 1 - i))
    for i, n in enumerate(shape):
        core = torch.tensordot(orthonormal(n, n, seed + i + 1), core, dims=([1], [i])).movedim(0, i)
    return core


def cores():
    """name → core. Spectra of all the kinds that make a rank hard to choose, and awkward shapes."""
    shape = (24, 20, 3, 3)
    step = torch.ones(64, dtype=torch.float64)
    step[6:] = 1e-3
    low = torch.tensordot(gaussian(20, 4, seed=30), gaussian(4, 18, seed=31), dims=1).reshape(20, 6, 3)
    return {
        "flat": _spectrum_core(shape, lambda n: torch.ones(n, dtype=torch.float64), 1),
        "geometric 1e-2": _spectrum_core(shape, lambda n: torch.logspace(0, -2, n).double(), 2),
        "geometric 1e-6": _spectrum_core(shape, lambda n: torch.logspace(0, -6, n).double(), 3),
        "algebraic": _spectrum_core(shape, lambda n: 1 / torch.arange(1, n + 1).double(), 4),
        "gap": _spectrum_core(shape, lambda n: step[:n], 5),
        "large": _spectrum_core((72, 48, 3, 3), lambda n: torch.logspace(0, -3, n).double(), 6),
        "deficient": low,
        "matrix": geometric(40, 30, 1e-3, 7),
        "pointwise": geometric(30, 12, 1e-2, 8).reshape(30, 12, 1, 1),
        "one mode": gaussian(7, seed=9),
        "tall": _spectrum_core((40, 2, 3), lambda n: torch.logspace(0, -1, n).double(), 10),
        "cube": _spectrum_core((9, 10, 11), lambda n: torch.logspace(0, -2, n).double(), 11),
        "five modes": _spectrum_core((8, 7, 3, 3, 3), lambda n: torch.logspace(0, -2, n).double(), 12),
        "single entry": gaussian(1, 1, 1, seed=13),
        "ties": torch.eye(12, dtype=torch.float64),
        "rotated ties": orthonormal(40, 40, 14),
        "zero": torch.zeros(5, 4, 3, dtype=torch.float64),
        "tiny": 1e-30 * _spectrum_core((10, 8, 3, 3), lambda n: torch.logspace(0, -2, n).double(), 15),
    }


def infeasible_cores(tol):
    """Cores whose rank by tolerance exceeds the product of the others in one mode, whichever it is.

    Orthogonal fibres along that mode: 2×2 long ones, and 4 + 4 short ones beside them. The bound lies between the
    energy of all eight and that of the four that another mode would lose: that mode keeps 2, this one 4 and some.
    """
    short = math.sqrt(4 * tol**2 / 3 / (5 - 8 * tol**2 / 3))
    core = torch.zeros(14, 4, 4, dtype=torch.float64)
    for k, (i, j) in enumerate((i, j) for i in range(4) for j in range(4) if min(i, j) < 2):
        core[k, i, j] = (1 if max(i, j) < 2 else short) * (1 - 0.002 * k)
    for mode, n in enumerate(core.shape):
        core = torch.tensordot(orthonormal(n, n, mode), core, dims=([1], [mode])).movedim(0, mode)
    return {
        "first": core,
        "middle": core.transpose(0, 1).contiguous(),
        "last": core.permute(1, 2, 0).contiguous(),
        "forced": (gaussian(40, 1, seed=7) @ gaussian(1, 2, seed=8)).reshape(40, 2, 1, 1),
    }


def least_ranks(name, core):
    """1, but for a bound that no rank can keep."""
    return [7 if name == "forced" and i == 0 else 1 for i in range(core.ndim)]


def matrices():
    """name → matrix, for the QR and the SVD."""
    return {
        "tall": gaussian(70, 33, seed=1),
        "wide": gaussian(33, 70, seed=2),
        "square": gaussian(65, 65, seed=3),
        "condition 1e-4": geometric(60, 40, 1e-4, 4),
        "condition 1e-8": geometric(60, 40, 1e-8, 5),
        "graded columns": gaussian(50, 30, seed=6) * torch.logspace(0, -30, 30).double(),
        "graded rows": gaussian(50, 30, seed=7) * torch.logspace(0, -12, 50).double()[:, None],
        "deficient": gaussian(50, 5, seed=8) @ gaussian(5, 30, seed=9),
        "zero": torch.zeros(6, 4, dtype=torch.float64),
        "zero column": torch.cat([gaussian(20, 3, seed=10), torch.zeros(20, 1).double(), gaussian(20, 3, seed=11)], 1),
        "kahan": kahan(40, 40),
        "vandermonde": vandermonde(60, 20),
        "near duplicates": near_duplicates(60, 20, 1e-6, 12),
        "orthonormal": orthonormal(50, 20, 13),
        "one row": gaussian(1, 9, seed=14),
        "one column": gaussian(9, 1, seed=15),
        "one entry": -torch.ones(1, 1, dtype=torch.float64),
        "large entries": 1e18 * gaussian(20, 12, seed=16),
        "tiny entries": 1e-30 * gaussian(20, 12, seed=17),
    }


def gram_problems(dtype):
    """name → (C, mode, B): sides that C can and cannot explain, whatever its condition and rank."""
    shapes = {"convolution": ((20, 33, 3, 3), 1), "first": ((70, 12, 2), 0), "last": ((5, 40, 9), 2)}
    tensors = {name: (gaussian(*shape, seed=i), mode) for i, (name, (shape, mode)) in enumerate(shapes.items())}
    for exponent in (2, 4, 6, 8):
        tensors[f"condition 1e-{exponent}"] = geometric(30, 66, 10.0**-exponent, exponent), 0
    padded = torch.zeros(24, 20, dtype=torch.float64)
    padded[:17, :11] = gaussian(17, 11, seed=11)
    tensors |= {
        "deficient": (gaussian(40, 6, seed=12) @ gaussian(6, 50, seed=13), 0),
        "more columns than fibres": (gaussian(3, 40, seed=14), 1),
        "inactive padding": (padded, 0),
        "inactive padding, other mode": (padded, 1),
        "flat": (orthonormal(33, 33, 15), 1),
        "tiny": (1e-15 * gaussian(9, 8, seed=16), 0),
        "one": (gaussian(1, seed=17), 0),
    }
    found = {}
    for i, (name, (C, mode)) in enumerate(tensors.items()):
        M = unfold(C, mode)
        found[f"{name}, any side"] = C, mode, gaussian(7, len(M), seed=100 + i)
        found[f"{name}, explained side"] = C, mode, gaussian(70, M.shape[1], seed=200 + i) @ M.T
    return {name: (C.to(dtype), mode, B.to(dtype)) for name, (C, mode, B) in found.items()}
