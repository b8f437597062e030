"""tangent_basis: orthonormal or exactly zero, spans every direction, finds the right number, tells bad input apart."""

import math

import pytest
import torch
from matrix_families import gaussian, orthonormal, tangent_problems
from tolerances import TOLERANCES

import tucker_kernels as tk

DTYPES = (torch.float32, torch.float64)
BACKENDS = ("reference", "cpu")
PROBLEMS = tangent_problems()


def rounded(name, dtype):
    U, D, wanted = PROBLEMS[name]
    return U.to(dtype), D.to(dtype), wanted


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2)) if min(matrix.shape) else 0.0


def check(U, D, V, count, unseen=0.0):
    """The contract, against float64 arithmetic on the rounded inputs; a part `unseen` of a direction may be lost."""
    n, dtype = U.shape[0], U.dtype
    assert V.shape == D.shape
    assert V.dtype == dtype
    assert not V[:, count:].any(), "columns beyond the count must be exactly zero"
    basis = torch.cat([U, V[:, :count]], 1).double()
    defect = basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)
    r = U.shape[1]
    own = TOLERANCES["orthogonality"][dtype]
    assert spectral(defect[r:, r:]) <= own, f"V is orthonormal to {spectral(defect[r:, r:]):.1e} only"
    # V cannot be more orthogonal to U than U is to itself.
    assert spectral(defect[r:, :r]) <= own + spectral(defect[:r, :r]), f"VᵀU is {spectral(defect[r:, :r]):.1e}"
    wide = D.double()
    lengths = wide.norm(dim=0)
    wide = wide[:, lengths >= 1e-30] / lengths[lengths >= 1e-30]
    residual = (wide - basis @ (basis.T @ wide)).norm(dim=0)
    allowed = max(8 * math.sqrt(n) * torch.finfo(dtype).eps, unseen)
    if residual.numel():
        assert float(residual.max()) <= allowed, (
            f"a direction is {float(residual.max()):.1e} outside, {allowed:.1e} allowed"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_families_in_one_call(backend, dtype):
    names = list(PROBLEMS)
    problems = [rounded(name, dtype) for name in names]
    with tk.use_backend(backend):
        found, counts = tk.tangent_basis([u for u, _, _ in problems], [d for _, d, _ in problems])
    assert counts.dtype == torch.int64
    for name, (U, D, wanted), V, count in zip(names, problems, found, counts.tolist()):
        try:
            check(U, D, V, count)
            if wanted is not None:
                assert count == wanted, f"{count} columns found, not {wanted}"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["basis", "direction"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_problem_that_is_not_finite_is_marked_and_leaves_the_others_alone(bad, where, backend):
    U, D, wanted = rounded("gaussian", torch.float32)
    spoilt_u, spoilt_d = U.clone(), D.clone()
    (spoilt_u if where == "basis" else spoilt_d)[5, 3] = bad
    with tk.use_backend(backend):
        found, counts = tk.tangent_basis([U, spoilt_u, U], [D, spoilt_d, D])
    assert counts.tolist() == [wanted, -1, wanted]
    assert not found[1].any()
    check(U, D, found[0], wanted)
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_of_the_inputs_does_not_matter(dtype):
    U, D, _ = rounded("wide", dtype)
    (plain,), _ = tk.tangent_basis([U], [D])
    (strided,), _ = tk.tangent_basis([U.T.contiguous().T], [torch.stack([D, -D], 2)[:, :, 0]])
    assert torch.equal(plain, strided)


def test_result_does_not_depend_on_threads_or_company():
    problems = [rounded(name, torch.float32) for name in PROBLEMS]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tk.tangent_basis([u for u, _, _ in problems], [d for _, d, _ in problems]))
    finally:
        torch.set_num_threads(before)
    alone = [tk.tangent_basis([u], [d])[0][0] for u, d, _ in problems]
    for found, counts in results:
        assert torch.equal(counts, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(found, alone))


def test_small_steps_do_not_lose_the_direction():
    """Gradients many orders smaller than the factor: only the direction counts."""
    U, D, wanted = rounded("gaussian", torch.float32)
    (V,), counts = tk.tangent_basis([U], [D * 1e-25])
    assert counts.tolist() == [wanted]
    check(U, D, V, wanted)


@pytest.mark.long
def test_a_thousand_steps_do_not_drift():
    """U ← [U|V] Q with random rotations Q, in float32: the basis stays orthonormal to 1e-6."""
    n, r = 128, 32
    U = orthonormal(n, r, 3).float()
    for step in range(1000):
        (V,), counts = tk.tangent_basis([U], [gaussian(n, r, seed=step).float()])
        assert counts.tolist() == [r]
        rotation = orthonormal(2 * r, r, step + 1).float()
        U = tk.mode_dot(rotation.T.contiguous(), torch.cat([U, V], 1), 1).T.contiguous()
        (U,), _ = tk.batched_qr([U])
    basis = U.double()
    assert spectral(basis.T @ basis - torch.eye(r, dtype=torch.float64)) <= 1e-6


def one_pass(U, D):
    """Classical Gram-Schmidt without reorthogonalisation, in the dtype given."""
    V = torch.zeros_like(D)
    for j, d in enumerate((D / D.norm(dim=0)).unbind(1)):
        v = d - U @ (U.T @ d)
        v = v - V[:, :j] @ (V[:, :j].T @ v)
        V[:, j] = v / v.norm()
    return V


def planted():
    U, D, _ = rounded("condition 1e-4", torch.float32)
    (V,), counts = tk.tangent_basis([U], [D])
    count = int(counts[0])
    missing = V.clone()
    missing[:, count - 1] = 0
    return {
        "one pass of Gram-Schmidt": (U, D, one_pass(U, D), D.shape[1]),
        "not projected on the complement of U": (U, D, torch.linalg.qr(D)[0], D.shape[1]),
        "a direction left out": (U, D, missing, count - 1),
        "a column behind the count": (U, D, V, count - 1),
        "columns not of length one": (U, D, V * 1.001, count),
    }


@pytest.mark.parametrize("mistake", sorted(planted()))
def test_the_check_sees_planted_mistakes(mistake):
    with pytest.raises(AssertionError):
        check(*planted()[mistake])
