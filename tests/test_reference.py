"""The reference itself, which every other back end is held to: against einsum, torch.linalg and TensorLy."""

import math
import string

import oracles
import pytest
import tensorly
import torch
from tensorly.tenalg import mode_dot as tensorly_mode_dot
from tensorly.tenalg import multi_mode_dot as tensorly_multi_mode_dot
from tensorly.tucker_tensor import tucker_to_tensor as tensorly_tucker_to_tensor
from tolerances import assert_close

import tucker_kernels as tk

SHAPES = [(5,), (4, 3), (3, 4, 2), (2, 3, 4, 5), (2, 1, 3, 1, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def reference():
    with tensorly.backend_context("pytorch"), tk.use_backend("reference"):
        yield


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- multilinear algebra -----------------------------------------------------------------------------------


@shapes
def test_unfold_and_fold_follow_tensorly(shape):
    tensor = rand(*shape)
    for mode in range(-len(shape), len(shape)):
        matrix = tk.unfold(tensor, mode)
        assert torch.equal(matrix, tensorly.unfold(tensor, mode % len(shape)))
        assert torch.equal(tk.fold(matrix, mode, shape), tensor)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 0)], ids=str)
def test_unfold_and_fold_of_nothing(shape):
    for mode, n in enumerate(shape):
        matrix = tk.unfold(rand(*shape), mode)
        assert matrix.shape == (n, math.prod(shape[:mode] + shape[mode + 1 :]))
        assert tk.fold(matrix, mode, shape).shape == shape


@shapes
def test_mode_dot(shape):
    tensor = rand(*shape)
    for mode, n in enumerate(shape):
        for transpose in (False, True):
            matrix = rand(n, 6) if transpose else rand(6, n)
            y = tk.mode_dot(tensor, matrix, mode, transpose)
            assert_close(y, oracles.mode_dot(tensor, matrix, mode, transpose), "mode_dot")
            assert_close(y, tensorly_mode_dot(tensor, matrix, mode, transpose=transpose), "mode_dot")


@shapes
@pytest.mark.parametrize("transpose", [False, True])
def test_multi_mode_dot(shape, transpose):
    tensor = rand(*shape)
    matrices = [rand(n, i + 1) if transpose else rand(i + 1, n) for i, n in enumerate(shape)]
    for skip in (None, len(shape) - 1):
        expected = tensorly_multi_mode_dot(tensor, matrices, skip=skip, transpose=transpose)
        assert_close(tk.multi_mode_dot(tensor, matrices, skip=skip, transpose=transpose), expected, "multi_mode_dot")
    backwards = list(range(len(shape)))[::-1]
    expected = tensorly_multi_mode_dot(tensor, matrices[::-1], modes=backwards, transpose=transpose)
    assert_close(tk.multi_mode_dot(tensor, matrices[::-1], backwards, None, transpose), expected, "multi_mode_dot")


@shapes
def test_tucker_to_tensor(shape):
    core, factors = rand(*shape), [rand(n + 2, n) for n in shape]
    full = tk.tucker_to_tensor(core, factors)
    assert_close(full, oracles.tucker_to_tensor(core, factors), "multi_mode_dot")
    assert_close(full, tensorly_tucker_to_tensor((core, factors)), "multi_mode_dot")
    partly = [None, *factors[1:]]
    assert_close(tk.tucker_to_tensor(core, partly), oracles.tucker_to_tensor(core, partly), "multi_mode_dot")


@shapes
def test_cross_gram(shape):
    for mode, n in enumerate(shape):
        a, b = rand(*shape), rand(*shape[:mode], n + 1, *shape[mode + 1 :])
        letters = string.ascii_lowercase[: len(shape)]
        other = letters.replace(letters[mode], "z")
        expected = torch.einsum(f"{letters},{other}->{letters[mode]}z", a, b)
        scale = float(a.norm() * b.norm())
        assert_close(torch.ops.tucker_kernels.cross_gram(a, b, mode), expected, "cross_gram", scale)


def test_halves_accumulate_in_float32():
    """4096 ones sum to 4096 exactly; a running sum in bfloat16 stops at 256."""
    x, m = torch.ones(4096, 1, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bfloat16)
    assert tk.mode_dot(x, m, 0).item() == 4096
    assert tk.multi_mode_dot(x, [m, torch.ones(1, 1, dtype=torch.bfloat16)]).item() == 4096
    assert torch.ops.tucker_kernels.cross_gram(m, m, 0).item() == 4096


# ---- rank space --------------------------------------------------------------------------------------------


def orthogonality(*blocks):
    """‖QᵀQ − I‖_max over the columns that are not exactly zero."""
    Q = torch.cat(blocks, 1).double()
    Q = Q[:, Q.any(0)]
    return float((Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_tangent_basis(dtype, condition):
    U = torch.linalg.qr(rand(40, 6))[0].to(dtype)
    D = (rand(40, 5) @ torch.diag(torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)) @ rand(5, 5)).to(
        dtype
    )
    (V,), counts = tk.tangent_basis([U], [D])
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    assert orthogonality(U, V) < limit
    kept = int(counts[0])
    assert V[:, :kept].any(0).all()
    assert not V[:, kept:].any()
    basis, unit = torch.cat([U, V], 1).double(), D.double() / D.double().norm(dim=0)
    missing = (unit - basis @ (basis.T @ unit)).norm(dim=0).max()
    assert missing <= 8 * math.sqrt(40) * torch.finfo(dtype).eps


def test_tangent_basis_counts_what_is_new():
    U = torch.eye(8, 3, dtype=torch.float64)
    fresh, tiny = rand(8, 1), 1e-35 * rand(8, 1)
    directions = [
        (torch.zeros(8, 2, dtype=torch.float64), 0),
        (U @ rand(3, 4), 0),
        (torch.cat([fresh, 2 * fresh, U @ rand(3, 1)], 1), 1),
        (torch.cat([tiny, 1e-20 * fresh], 1), 1),
        (rand(8, 8), 5),
        (torch.cat([rand(8, 1), torch.full((8, 1), torch.nan)], 1), -1),
    ]
    _, counts = tk.tangent_basis([U] * len(directions), [D for D, _ in directions])
    assert counts.tolist() == [count for _, count in directions]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tolerance_mode", ["global", "per_mode"])
@pytest.mark.parametrize("tol", [0.0, 1e-3, 0.1, 0.5, 1.0])
def test_truncation(dtype, tolerance_mode, tol):
    """Ranks are those of a float64 SVD of each unfolding, and error, core and projections are what they say."""
    cores = [rand(6, 5, 3, 3).to(dtype), rand(8, 2).to(dtype), (rand(7, 3) @ rand(3, 6)).to(dtype)]
    new, projections, ranks, errors = tk.hosvd_truncate(cores, tol=tol, tolerance_mode=tolerance_mode)
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    for core, small, matrices, row, error in zip(cores, new, projections, ranks.tolist(), errors.tolist()):
        C = core.double()
        budget = (tol * float(C.norm())) ** 2 / (C.ndim if tolerance_mode == "global" else 1)
        wanted = []
        for i, n in enumerate(C.shape):
            sigma = torch.linalg.svdvals(tk.unfold(C, i))
            tails = [float((sigma[k:] ** 2).sum()) for k in range(n + 1)]
            wanted.append(max(1, next(k for k, tail in enumerate(tails) if tail <= budget)))
        if tol > 0:
            assert row[: C.ndim] == wanted
        assert not any(row[C.ndim :])
        for P, r in zip(matrices, row):
            assert orthogonality(P) < limit
            assert P[:, :r].any(0).all()
            assert not P[:, r:].any()
        assert_close(small, tk.multi_mode_dot(C, [P.double() for P in matrices], transpose=True), "factorisation")
        outside = small.clone()
        outside[tuple(slice(0, r) for r in row[: core.ndim])] = 0
        assert not outside.any()
        loss = float((C - tk.multi_mode_dot(small.double(), [P.double() for P in matrices])).norm() / C.norm())
        assert abs(loss - error) < 10 * limit
        if tolerance_mode == "global":
            assert error <= tol + limit


def test_truncation_to_given_ranks_equals_the_svd_of_a_matrix():
    A = rand(7, 5)
    (small,), ((P, Q),), ranks, (error,) = tk.hosvd_truncate([A], ranks=(2, 2))
    U, s, Vh = torch.linalg.svd(A)
    assert ranks.tolist() == [[2, 2]]
    assert_close(P @ small @ Q.T, U[:, :2] * s[:2] @ Vh[:2], "factorisation")
    assert abs(float(error) - float(s[2:].norm() / s.norm())) < 1e-12


def test_truncation_of_some_modes_bounds_and_feasible_ranks():
    core = rand(6, 5, 2)
    _, (projections,), ranks, _ = tk.hosvd_truncate([core], tol=0.9, modes=(0, 1), min_rank=3, max_rank=4)
    assert projections[2] is None
    assert ranks[0, 2] == 2
    assert ((ranks[0, :2] >= 3) & (ranks[0, :2] <= 4)).all()
    _, _, ranks, error = tk.hosvd_truncate([rand(8, 3, 2)], ranks=(8, 1, 2))
    assert ranks.tolist() == [[2, 1, 2]]  # a rank never exceeds the product of the others
    zero = torch.zeros(4, 3, dtype=torch.float64)
    (small,), _, ranks, error = tk.hosvd_truncate([zero], tol=0.1)
    assert ranks.tolist() == [[1, 1]]
    assert float(error[0]) == 0.0
    assert torch.equal(small, zero)


MATRICES = [(5, 5), (9, 4), (4, 9), (1, 6), (6, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batched_qr(dtype):
    matrices = [rand(*shape).to(dtype) for shape in MATRICES]
    for A, Q, R in zip(matrices, *tk.batched_qr(matrices)):
        expected, triangle = torch.linalg.qr(A.double())
        sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).double()
        assert_close(Q, expected * sign, "factorisation")
        assert_close(R, triangle * sign[:, None], "factorisation")
        assert (R.diagonal() >= 0).all()
        assert torch.equal(R, R.triu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batched_svd(dtype):
    matrices = [rand(*shape).to(dtype) for shape in MATRICES]
    for A, U, s, Vh in zip(matrices, *tk.batched_svd(matrices)):
        assert_close(s, torch.linalg.svdvals(A.double()), "factorisation")
        assert_close((U.double() * s.double() @ Vh.double()).to(dtype), A, "factorisation")
        assert max(orthogonality(U), orthogonality(Vh.T)) < {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]


MISTAKES = {
    "a transposed matrix": lambda x, m: tk.mode_dot(x, m.T.contiguous(), 1),
    "the mode beside it": lambda x, m: tk.mode_dot(x, m, 0),
    "a scale": lambda x, m: tk.mode_dot(x, m * (1 + 1e-9), 1),
    "single precision": lambda x, m: tk.mode_dot(x.float(), m.float(), 1).double(),
    "one entry missing": lambda x, m: tk.mode_dot(torch.cat([x[:, :-1], 0 * x[:, -1:]], 1), m, 1),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_rejects(mistake):
    x, m = rand(3, 3, 3), rand(3, 3)
    with pytest.raises(AssertionError):
        assert_close(MISTAKES[mistake](x, m), oracles.mode_dot(x, m, 1), "mode_dot")


def test_the_oracle_rejects_nan():
    with pytest.raises(AssertionError):
        assert_close(torch.full((2,), torch.nan, dtype=torch.float64), torch.ones(2, dtype=torch.float64), "mode_dot")
