"""batched_svd: singular values of a float64 SVD, orthonormal vectors on both sides also where values are zero."""

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


def check(A, U, s, Vh):
    m, n = A.shape
    k = min(m, n)
    assert (U.shape, s.shape, Vh.shape) == ((m, k), (k,), (k, n))
    own = TOLERANCES["orthogonality"][A.dtype]
    for name, vectors in (("U", U.double()), ("V", Vh.double().T)):
        defect = spectral(vectors.T @ vectors - torch.eye(k, dtype=torch.float64))
        assert defect <= own, f"{name} is orthonormal to {defect:.1e} only"
    assert (s >= 0).all(), "a singular value is negative"
    assert (s[1:] <= s[:-1]).all(), "singular values are not in descending order"
    expected = torch.linalg.svdvals(A.double())
    largest = float(expected[0])
    allowed = TOLERANCES["factorisation"][A.dtype] * largest
    assert float((s.double() - expected).abs().max()) <= allowed, "singular values differ from the float64 ones"
    assert spectral(U.double() * s.double() @ Vh.double() - A.double()) <= allowed, "U diag(s) Vh is not A"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_families_in_one_call(backend, dtype):
    inputs = {name: A.to(dtype) for name, A in FAMILIES.items()}
    with tk.use_backend(backend):
        us, ss, vs = tk.batched_svd(list(inputs.values()))
    for (name, A), U, s, Vh in zip(inputs.items(), us, ss, vs):
        try:
            check(A, U, s, Vh)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_small_singular_values_of_graded_columns_are_accurate_relative_to_themselves():
    """One-sided Jacobi sees 1e-30 beside 1 where the columns are graded; an SVD by bidiagonalisation does not."""
    scale = torch.logspace(0, -30, 12).double()
    A = gaussian(20, 12, seed=6) * scale
    with tk.use_backend("cpu"):
        _, (s,), _ = tk.batched_svd([A])
    # Oracle: the same in 60 digits by scaling rows out is not at hand; products of values are: det(AᵀA) = Π s².
    sign, logdet = torch.linalg.slogdet((A / scale).T @ (A / scale))
    assert sign > 0
    expected = float(logdet) / 2 + float(scale.log().sum())
    assert abs(float(s.log().sum()) - expected) <= 1e-9 * abs(expected)


def test_result_does_not_depend_on_threads_layout_or_company():
    inputs = [A.float() for A in FAMILIES.values()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = tk.batched_svd(inputs)
        torch.set_num_threads(3)
        second = tk.batched_svd([A.T.contiguous().T for A in inputs])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(tk.batched_svd([inputs[3]])[1][0], first[1][3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone(bad):
    A = gaussian(9, 5, seed=4).float()
    spoilt = A.clone()
    spoilt[2, 3] = bad
    with tk.use_backend("cpu"):
        us, ss, vs = tk.batched_svd([spoilt, A])
    assert all(torch.isnan(x[0]).all() for x in (us, ss, vs))
    check(A, us[1], ss[1], vs[1])


def by_gram(A):
    """The shortcut through AᵀA, which loses every singular value below √u."""
    values, vectors = torch.linalg.eigh(A.T @ A)
    s, V = values.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    return A @ V / s.clamp_min(1e-30), s, V.T


def planted():
    A = FAMILIES["condition 1e-4"].float()[:, :20]
    (U,), (s,), (Vh,) = tk.batched_svd([A])
    return {
        "through the Gram matrix": (FAMILIES["condition 1e-8"].float(), *by_gram(FAMILIES["condition 1e-8"].float())),
        "ascending": (A, U.flip(1), s.flip(0), Vh.flip(0)),
        "one sign": (A, torch.cat([-U[:, :1], U[:, 1:]], 1), s, Vh),
        "values off by a thousandth": (A, U, s * 1.001, Vh),
    }


@pytest.mark.parametrize("mistake", sorted(planted()))
def test_the_check_sees_planted_mistakes(mistake):
    with pytest.raises(AssertionError):
        check(*planted()[mistake])
