"""batched_qr: A = QR to rounding, Q orthonormal whatever A is, R triangular with a non-negative diagonal."""

import math

import pytest
import torch
from matrix_families import gaussian, matrices
from tolerances import TOLERANCES

import tucker_kernels as tk

DTYPES = (torch.float32, torch.float64)
FAMILIES = matrices()


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2)) if min(matrix.shape) else 0.0


def check(A, Q, R):
    m, n = A.shape
    k = min(m, n)
    assert Q.shape == (m, k)
    assert R.shape == (k, n)
    assert Q.dtype == R.dtype == A.dtype
    wide = Q.double()
    defect = spectral(wide.T @ wide - torch.eye(k, dtype=torch.float64))
    assert defect <= TOLERANCES["orthogonality"][A.dtype], f"Q is orthonormal to {defect:.1e} only"
    assert not R.tril(-1).any(), "R is not upper triangular"
    assert (torch.diagonal(R) >= 0).all(), "R has a negative diagonal entry"
    # Householder QR is stable column by column, so a small column is right relative to its own size.
    error = (wide @ R.double() - A.double()).norm(dim=0)
    allowed = TOLERANCES["factorisation"][A.dtype] * A.double().norm(dim=0)
    assert (error <= allowed + 1e-44).all(), (
        f"QR differs from A by {float((error / allowed).max()):.1f} times the bound"
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_families_in_one_call(backend, dtype):
    inputs = {name: A.to(dtype) for name, A in FAMILIES.items()}
    with tk.use_backend(backend):
        qs, rs = tk.batched_qr(list(inputs.values()))
    for (name, A), Q, R in zip(inputs.items(), qs, rs):
        try:
            check(A, Q, R)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_of_full_rank_matrices_are_the_unique_ones(dtype):
    A = gaussian(90, 40, seed=3).to(dtype)
    (Q,), (R,) = tk.batched_qr([A])
    exact, triangle = torch.linalg.qr(A.double())
    sign = torch.sign(torch.diagonal(triangle))
    bound = 20 * TOLERANCES["factorisation"][dtype]  # times the condition number, about 5
    assert (Q.double() - exact * sign).abs().max() <= bound
    assert (R.double() - triangle * sign[:, None]).abs().max() <= bound * triangle.abs().max()


def test_result_does_not_depend_on_threads_layout_or_company():
    inputs = [A.float() for A in FAMILIES.values()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        qs, rs = tk.batched_qr(inputs)
        torch.set_num_threads(3)
        others = tk.batched_qr([A.T.contiguous().T for A in inputs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(qs + rs, others[0] + others[1]))
    (alone,), _ = tk.batched_qr([inputs[4]])
    assert torch.equal(alone, qs[4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone(bad):
    A = gaussian(9, 5, seed=4).float()
    spoilt = A.clone()
    spoilt[2, 3] = bad
    with tk.use_backend("cpu"):
        qs, rs = tk.batched_qr([spoilt, A])
    assert torch.isnan(qs[0]).all()
    assert torch.isnan(rs[0]).all()
    check(A, qs[1], rs[1])


def test_a_wide_matrix_has_no_derivative():
    matrices = [gaussian(4, 3), gaussian(3, 4).requires_grad_()]
    qs, rs = tk.batched_qr(matrices)
    with pytest.raises(RuntimeError, match=r"matrix 1 has more columns \(4\) than rows \(3\)"):
        (qs[1].sum() + rs[1].sum()).backward()


def cholesky_qr(A):
    R = torch.linalg.cholesky(A.T @ A, upper=True)
    return torch.linalg.solve_triangular(R, A, upper=True, left=False), R


def planted():
    A = FAMILIES["condition 1e-4"].float()[:, :20]
    (Q,), (R,) = tk.batched_qr([A])
    flipped = torch.ones(20)
    flipped[3] = -1
    return {
        "one pass of Cholesky QR": (A, *cholesky_qr(A)),
        "a negative diagonal": (A, Q * flipped, R * flipped[:, None]),
        "another matrix": (A * 1.0001, Q, R),
        "not triangular": (A, Q @ torch.eye(20).roll(1, 0), torch.eye(20).roll(1, 0).T @ R),
    }


@pytest.mark.parametrize("mistake", sorted(planted()))
def test_the_check_sees_planted_mistakes(mistake):
    with pytest.raises(AssertionError):
        check(*planted()[mistake])
