"""The operators of the CUDA back end against the checks that the other back ends pass.

Twice the same tests: `emulated`, with the device code on the host (csrc/emu), and `cuda`, on a GPU (marker gpu). Public
functions are called, so wrappers, bindings, launch plans and kernels are all under test.
"""

import copy
import math

import pytest
import tdlrt
import test_batched_svd
import test_gram_solve
import test_hosvd_truncate
import test_rotate_bases as test_rotate_bases_elsewhere
import test_tangent_basis
import torch
from matrix_families import (
    cores,
    gaussian,
    gram_problems,
    infeasible_cores,
    least_ranks,
    matrices,
    orthonormal,
    tangent_problems,
)
from tolerances import TOLERANCES, assert_close

import tucker_kernels as tk
from tucker_kernels import cuda, reference

FULL = (torch.float32, torch.float64)
ALL = (*FULL, torch.bfloat16, torch.float16)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        available, reason = tk.backends()["cuda"]
        if not available:
            pytest.fail(f"the cuda back end cannot run: {reason}")
        yield torch.device("cuda")
        return
    from emu import device as emulated

    emulated.install(monkeypatch)
    yield torch.device("cpu")


# ---- products ---------------------------------------------------------------------------------------------

PRODUCTS = {
    "vector": ((5,), {0: 3}),
    "rows": ((70, 33), {0: 65}),
    "columns": ((70, 33), {1: 20}),
    "inner": ((7, 66, 9), {1: 70}),
    "convolution": ((20, 12, 3, 3), {0: 9, 1: 8, 3: 2}),
    "every mode": ((2, 3, 4, 5), {3: 5, 2: 4, 1: 3, 0: 2}),
    "empty result": ((0, 4, 3), {1: 5}),
    "empty sum": ((4, 0, 3), {1: 5}),
    "eight modes": ((2,) * 8, {7: 3, 0: 1}),
    "nine modes": ((2,) * 9, {8: 3}),
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_multi_mode_dot(name, dtype, transpose, device):
    shape, rows = PRODUCTS[name]
    x = gaussian(*shape).to(dtype)
    ms = [gaussian(*((shape[m], r) if transpose else (r, shape[m])), seed=m + 1).to(dtype) for m, r in rows.items()]
    y = tk.multi_mode_dot(x.to(device), [m.to(device) for m in ms], list(rows), transpose=transpose)
    expected = reference.multi_mode_dot(x.double(), [m.double() for m in ms], list(rows), transpose)
    assert_close(
        y.cpu(), expected, "multi_mode_dot", scale=max(float(expected.abs().max()) if expected.numel() else 0, 1)
    )


def test_memory_format_is_kept(device):
    x = gaussian(2, 7, 6, 5).float().to(memory_format=torch.channels_last).to(device)
    y = tk.mode_dot(x, gaussian(4, 7, seed=1).float().to(device), 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(
        y.cpu(), reference.mode_dot(x.cpu().double(), gaussian(4, 7, seed=1).float().double(), 1, False), "mode_dot"
    )


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_derivatives(dtype, device):
    x, m = gaussian(5, 6, 4).to(dtype), gaussian(3, 6, seed=1).to(dtype)
    grads = []
    for where, wide in ((device, dtype), (torch.device("cpu"), torch.float64)):
        leaves = [t.to(where, wide).requires_grad_() for t in (x, m)]
        apply = tk.mode_dot if wide is dtype else lambda t, f, k: torch.tensordot(f, t, ([1], [k])).movedim(0, k)
        loss = (apply(*leaves, 1) ** 2).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*grads):
        assert_close(actual.cpu(), expected, "multi_mode_dot")


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize(("outer", "inner"), [(3, 7), (130, 1), (1, 700), (40, 30), (2000, 1)])
def test_cross_gram(outer, inner, dtype, device):
    a, b = gaussian(outer, 5, inner).to(dtype), gaussian(outer, 70, inner, seed=1).to(dtype)
    out = torch.ops.tucker_kernels.cross_gram(a.to(device), b.to(device), 1)
    expected = torch.einsum("oik,ojk->ij", a.double(), b.double())
    # Sums of up to 2,000 products in order: n u of their absolute values at the very worst, √n u in practice.
    assert_close(out.cpu(), expected, "cross_gram", scale=float(torch.einsum("oik,ojk->ij", a.abs(), b.abs()).max()))


# ---- orthonormalisation -----------------------------------------------------------------------------------


def unseen(D, dtype):
    """What two Gram matrices in float64 cannot tell from zero, as a part of a column: 8 n ε times the coefficients.

    In float32 that is below what rounding the matrix itself leaves. In float64 it is a limit of the method, documented
    in cuda.py. The coefficients are those with which a column is best written by those before it. Of the families here
    only the Vandermonde matrix needs it.
    """
    if dtype != torch.float64 or min(D.shape) == 0:
        return 0.0
    lengths = D.norm(dim=0)
    unit = D[:, lengths >= 1e-30] / lengths[lengths >= 1e-30]
    largest = 1.0
    for j in range(1, unit.shape[1]):
        coefficients = torch.linalg.lstsq(unit[:, :j], unit[:, j : j + 1], rcond=1e-15, driver="gelsd").solution
        if float((unit[:, :j] @ coefficients - unit[:, j : j + 1]).norm()) < 1e-4:  # else nothing is lost
            largest = max(largest, float(coefficients.norm()))
    return 8 * len(D) * torch.finfo(torch.float64).eps * largest if largest > 1 else 0.0


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_tangent_basis_on_all_families_in_one_call(dtype, device):
    problems = {name: (U.to(dtype), D.to(dtype), wanted) for name, (U, D, wanted) in tangent_problems().items()}
    found, counts = tk.tangent_basis(*([p[i].to(device) for p in problems.values()] for i in (0, 1)))
    assert counts.dtype == torch.int64
    for (name, (U, D, wanted)), V, count in zip(problems.items(), found, counts.tolist()):
        try:
            outside = D.double() - U.double() @ (U.double().T @ D.double())
            test_tangent_basis.check(U, D, V.cpu(), count, unseen(outside, dtype))
            assert wanted in (None, count), f"{count} columns found, not {wanted}"
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(("defect", "outside", "wanted"), [(1e-2, 0, 0), (1e-4, 3e-5, 20)])
def test_a_basis_that_is_not_quite_orthonormal(defect, outside, wanted, device):
    """A projection leaves `defect` of what lies inside: that is nothing, and hides nothing smaller that does not."""
    U = (orthonormal(96, 24) * torch.linspace(1 - defect, 1 + defect, 24).double()).float()
    D = orthonormal(24, 20, seed=1), orthonormal(96, 20, seed=2)
    D = (U.double() @ D[0] + outside * D[1]).float()
    _, counts = tk.tangent_basis([U.to(device)], [D.to(device)])
    assert counts.tolist() == [wanted]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_problem_that_is_not_finite_is_marked_and_leaves_the_others_alone(bad, where, device):
    U, D, wanted = (t.float() if isinstance(t, torch.Tensor) else t for t in tangent_problems()["gaussian"])
    spoilt = [U.clone(), D.clone()]
    spoilt[where][5, 3] = bad
    found, counts = tk.tangent_basis(
        [t.to(device) for t in (U, spoilt[0], U)], [t.to(device) for t in (D, spoilt[1], D)]
    )
    assert counts.tolist() == [wanted, -1, wanted]
    assert not found[1].any()
    assert torch.equal(found[0], found[2])
    test_tangent_basis.check(U, D, found[0].cpu(), wanted)


def test_a_basis_that_is_not_finite_is_marked_without_directions_too(device):
    U = orthonormal(9, 3).float()
    U[4, 2] = math.nan
    _, counts = tk.tangent_basis([U.to(device)], [U[:, :0].to(device)])
    assert counts.tolist() == [-1]


def test_company_changes_no_bit(device):
    problems = [(U.float().to(device), D.float().to(device)) for U, D, _ in tangent_problems().values()]
    together, _ = tk.tangent_basis([u for u, _ in problems], [d for _, d in problems])
    for (U, D), V in list(zip(problems, together))[::5]:
        assert torch.equal(tk.tangent_basis([U], [D])[0][0], V)


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2)) if min(matrix.shape) else 0.0


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_batched_qr_on_all_families_in_one_call(dtype, device):
    """Columns of Q are orthonormal, or exactly zero where what was left of a column is rounding; QR is A to that."""
    inputs = {name: A.to(dtype) for name, A in matrices().items()}
    qs, rs = tk.batched_qr([A.to(device) for A in inputs.values()])
    for (name, A), Q, R in zip(inputs.items(), qs, rs):
        Q, R = Q.cpu().double(), R.cpu().double()
        kept = Q.norm(dim=0) > 0.5
        gram = Q.T @ Q - torch.diag(kept.double())
        assert spectral(gram) <= TOLERANCES["orthogonality"][dtype], name
        assert not Q[:, ~kept].any(), name
        assert not R[~kept].any(), name
        assert not R.tril(-1).any(), name
        assert (torch.diagonal(R) >= 0).all(), name
        dependence = max(8 * math.sqrt(len(A)) * torch.finfo(dtype).eps, unseen(A, dtype))
        if A.shape[0] >= A.shape[1]:
            error = (Q @ R - A.double()).norm(dim=0)
            assert (error <= dependence * A.double().norm(dim=0) + 1e-30).all(), name


def test_qr_of_full_rank_is_the_unique_one(device):
    A = gaussian(90, 40, seed=3).float()
    (Q,), (R,) = tk.batched_qr([A.to(device)])
    exact, triangle = torch.linalg.qr(A.double())
    sign = torch.sign(torch.diagonal(triangle))
    assert_close(Q.cpu(), exact * sign, "factorisation", scale=5)  # times the condition number, about 5
    assert_close(R.cpu(), triangle * sign[:, None], "factorisation", scale=5 * float(triangle.abs().max()))


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_batched_svd_on_all_families_in_one_call(dtype, device):
    inputs = {name: A.to(dtype) for name, A in matrices().items()}
    us, ss, vs = tk.batched_svd([A.to(device) for A in inputs.values()])
    for (name, A), *factors in zip(inputs.items(), us, ss, vs):
        U, s, Vh = (t.cpu() for t in factors)
        short, long = (Vh.T, U) if A.shape[0] > A.shape[1] else (U, Vh.T)
        own = TOLERANCES["orthogonality"][dtype]
        assert spectral(short.double().T @ short.double() - torch.eye(len(s))) <= own, name
        kept = long.double().norm(dim=0) > 0.5
        assert spectral(long.double().T @ long.double() - torch.diag(kept.double())) <= own, name
        expected = torch.linalg.svdvals(A.double())
        # A Gram matrix in float64 ends at the square root of its own rounding.
        allowed = max(2 * TOLERANCES["factorisation"][dtype], 3e-8) * float(expected[0])
        assert (s[1:] <= s[:-1]).all(), name
        assert float((s.double() - expected).abs().max()) <= allowed, name
        assert spectral(U.double() * s.double() @ Vh.double() - A.double()) <= allowed, name


@pytest.mark.parametrize("shape", [(20, 7), (7, 20)])
@pytest.mark.parametrize("operator", [tk.batched_qr, tk.batched_svd])
def test_factors_of_a_matrix_that_is_not_finite_are_nan(operator, shape, device):
    A, bad = gaussian(*shape).float(), gaussian(*shape).float()
    bad[3, 3] = math.nan
    for alone, first, spoilt in zip(operator([A.to(device)]), *zip(*operator([A.to(device), bad.to(device)]))):
        assert torch.isnan(spoilt).all()
        assert torch.equal(alone[0], first)


@pytest.mark.parametrize("defect", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_rotate_bases(dtype, defect, device):
    bases, rotations = test_rotate_bases_elsewhere.problems(dtype, defect)
    found = tk.rotate_bases([b.to(device) for b in bases], [p.to(device) for p in rotations])
    for basis, rotation, rotated in zip(bases, rotations, found):
        test_rotate_bases_elsewhere.check(basis, rotation, rotated.cpu(), 3 * defect)
    with pytest.raises(AssertionError):
        test_rotate_bases_elsewhere.check(bases[4], rotations[4].flip(0), found[4].cpu(), 3 * defect)


def test_rotations_where_they_lie_and_what_is_not_finite(device):
    basis, rotation = orthonormal(40, 20).float().to(device), orthonormal(20, 20, 1).float().to(device)
    (plain,), (leading,) = (tk.rotate_bases([basis], [p]) for p in (rotation[:, :7].contiguous(), rotation[:, :7]))
    assert torch.equal(plain, leading)
    basis[3, 2] = math.nan
    assert tk.rotate_bases([basis], [rotation])[0].isnan().any()


# ---- division by Gram matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_gram_solve_on_all_families_in_one_call(dtype, device):
    problems = gram_problems(dtype)
    tensors, modes, sides = zip(*problems.values())
    found = tk.gram_solve([C.to(device) for C in tensors], list(modes), [B.to(device) for B in sides])
    for (name, (C, mode, B)), X in zip(problems.items(), found):
        try:
            test_gram_solve.check(C, mode, B, X.cpu())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_gram_solve_leaves_inactive_parts_zero_and_company_changes_no_bit(dtype, device):
    problems = gram_problems(dtype)
    C, mode, B = problems["inactive padding, explained side"]
    assert not B[:, 17:].any()
    tensors, modes, sides = zip(*problems.values())
    together = tk.gram_solve([C.to(device) for C in tensors], list(modes), [B.to(device) for B in sides])
    X = together[list(problems).index("inactive padding, explained side")]
    assert not X[:, 17:].any()
    assert torch.equal(tk.gram_solve([C.to(device)], [mode], [B.to(device)])[0], X)
    (small,) = tk.gram_solve([C[:17, :11].contiguous().to(device)], [0], [B[:, :17].contiguous().to(device)])
    assert_close(small.cpu(), X[:, :17].double().cpu(), "factorisation", scale=10 * float(X.abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gram_solve_of_zero_and_of_what_is_not_finite(bad, device):
    good, side = gaussian(6, 9).float(), gaussian(3, 6, seed=1).float()
    spoilt, spoilt_side = good.clone(), side.clone()
    spoilt[2, 3] = spoilt_side[1, 4] = bad
    tensors, sides = [good, torch.zeros(6, 9), spoilt, good, good[:, :0]], [side, side, side, spoilt_side, side]
    found = tk.gram_solve([C.to(device) for C in tensors], [0] * 5, [B.to(device) for B in sides])
    test_gram_solve.check(good, 0, side, found[0].cpu())
    assert not found[1].any()
    assert torch.isnan(found[2]).all()
    assert not torch.isfinite(found[3][1]).any()
    assert torch.equal(found[3][0], found[0][0])
    assert not found[4].any()


# ---- truncation -------------------------------------------------------------------------------------------


def truncated(dtype, device, **arguments):
    inputs = {name: core.to(dtype) for name, core in cores().items()}
    new, projections, ranks, error = tk.hosvd_truncate([c.to(device) for c in inputs.values()], **arguments)
    assert ranks.dtype == torch.int64
    assert error.dtype == torch.float64
    return {
        name: (core, (n.cpu(), [None if q is None else q.cpu() for q in p], r, e))
        for (name, core), n, p, r, e in zip(inputs.items(), new, projections, ranks.tolist(), error.tolist())
    }


@pytest.mark.long
@pytest.mark.parametrize("tol", [0.5, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_truncation_by_tolerance(dtype, tol, device):
    test_hosvd_truncate.check_all(truncated(dtype, device, tol=tol), tol=tol)


@pytest.mark.long
@pytest.mark.parametrize("tol", [0.3, 0.03])
def test_truncation_per_mode(tol, device):
    results = truncated(torch.float32, device, tol=tol, tolerance_mode="per_mode")
    test_hosvd_truncate.check_all(results, tol=tol, per_mode=True)


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_truncation_to_given_ranks(rank, device):
    for name, (core, result) in truncated(torch.float32, device, ranks=rank).items():
        try:
            test_hosvd_truncate.check(core, result, ranks=[rank] * core.ndim)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("tol", [0.05, 0.2, 0.4])
def test_ranks_are_cut_to_the_product_of_the_others(tol, dtype, device):
    """As the reference cuts them, with the same ranks."""
    cores = infeasible_cores(tol)
    inputs, least = [c.to(dtype) for c in cores.values()], [tuple(least_ranks(*item)) for item in cores.items()]
    results = [tk.hosvd_truncate([c.to(device) for c in inputs], tol=tol, min_rank=least)]
    with tk.use_backend("reference"):
        results.append(tk.hosvd_truncate(inputs, tol=tol, min_rank=least))
    assert results[0][2].tolist() == results[1][2].tolist()
    for name, core, *result in zip(cores, inputs, *results[0]):
        new, projections, ranks, error = result
        found = new.cpu(), [p.cpu() for p in projections], ranks.tolist(), float(error)
        test_hosvd_truncate.check(core, found, tol=tol, lower=least_ranks(name, core))


@pytest.mark.parametrize("tol", [0.05, 0.2, 0.4])
def test_the_cores_above_need_cutting(tol):
    for name, core in infeasible_cores(tol).items():
        bound, modes = tol**2 * float(core.norm()) ** 2 / core.ndim, range(core.ndim)
        wanted = [int((test_hosvd_truncate.tails(core, i)[:-1] > bound).sum()) for i in modes]
        wanted = [max(pair) for pair in zip(wanted, least_ranks(name, core))]
        assert test_hosvd_truncate.feasible(wanted, list(modes)) != wanted, name


def test_the_zero_core_keeps_an_identity_where_ranks_are_forced(device):
    core = torch.zeros(6, 2, 2, device=device)
    (new,), (projections,), ranks, _ = tk.hosvd_truncate([core], tol=0.1, min_rank=(5, 1, 1))
    assert ranks.tolist() == [[1, 1, 1]]
    assert not new.any()
    for P in projections:
        assert_close((P.T @ P).cpu(), torch.diag(torch.eye(len(P))[0]).double(), "orthogonality")


@pytest.mark.parametrize("n", [170, pytest.param(300, marks=pytest.mark.long)])
def test_a_mode_that_shared_memory_does_not_hold(n, device):
    """Part of the Cholesky factor and of Jacobi's columns lies in device memory: above 150 here, 238 on an H200."""
    core = torch.linalg.qr(gaussian(n, n, seed=n))[0] * torch.logspace(0, -2, n).double()
    core = (core @ torch.linalg.qr(gaussian(n, n, seed=n + 1))[0]).reshape(n, n, 1).float()
    new, projections, ranks, error = tk.hosvd_truncate([core.to(device)], tol=0.05, modes=(0,))
    kept = [None if p is None else p.cpu() for p in projections[0]]
    test_hosvd_truncate.check(core, (new[0].cpu(), kept, ranks[0].tolist(), float(error[0])), tol=0.05, truncated=[0])
    (V,), counts = tk.tangent_basis([core[:, :0, 0].to(device)], [core[:, :, 0].to(device)])
    test_tangent_basis.check(core[:, :0, 0], core[:, :, 0], V.cpu(), int(counts))


# Dynamic shared memory of exactly 48 KiB, which is more than a kernel gets unasked that declares some itself; and all
# that a block can have.
@pytest.mark.parametrize(("n", "p"), [(640, 1), (256, 1), (120, 108), (1422, 1), (3472, 1)])
@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_sizes_at_which_shared_memory_is_full(dtype, n, p, device):
    U, D = gaussian(n, 0).to(dtype), gaussian(n, p).to(dtype)
    (V,), counts = tk.tangent_basis([U.to(device)], [D.to(device)])
    test_tangent_basis.check(U, D, V.cpu(), int(counts))


@pytest.mark.parametrize("modes", [(0,), (0, 2), ()])
def test_chosen_modes(modes, device):
    core = cores()["cube"].float()
    new, projections, ranks, error = tk.hosvd_truncate([core.to(device)], tol=0.1, modes=modes)
    kept = [None if p is None else p.cpu() for p in projections[0]]
    result = (new[0].cpu(), kept, ranks[0].tolist(), float(error[0]))
    test_hosvd_truncate.check(core, result, tol=0.1, truncated=list(modes))


def test_every_core_has_its_own_tolerance(device):
    core, tolerances = cores()["geometric 1e-2"].float(), [0.5, 0.03]
    results = tk.hosvd_truncate([core.to(device)] * 2, tol=tolerances)
    for tol, new, projections, ranks, error in zip(tolerances, *results):
        result = new.cpu(), [p.cpu() for p in projections], ranks.tolist(), float(error)
        test_hosvd_truncate.check(core, result, tol=tol)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_core_that_is_not_finite_comes_back_unchanged(bad, device):
    good = cores()["cube"].float()
    spoilt = good.clone()
    spoilt[3, 4, 5] = bad
    new, projections, ranks, error = tk.hosvd_truncate([good.to(device), spoilt.to(device)], tol=0.1)
    assert torch.equal(new[1].cpu().isfinite(), spoilt.isfinite())
    assert torch.equal(new[1].cpu()[spoilt.isfinite()], spoilt[spoilt.isfinite()])
    assert ranks[1].tolist() == list(spoilt.shape)
    assert torch.isnan(error[1])
    assert all(torch.equal(p.cpu(), torch.eye(len(p))) for p in projections[1])
    assert torch.isfinite(error[0])


# ---- a whole step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_training_steps_are_those_of_the_host(base, device):
    """Three TDLRT steps of a small network in float64: same weights and ranks on the device as on the reference."""
    dense = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 12, 3), torch.nn.Flatten()
    ).double()
    images, wanted = gaussian(8, 3, 6, 6), gaussian(8, 12 * 16, seed=1)
    weights, ranks = [], []
    for where, backend in ((device, None), (torch.device("cpu"), "reference")):
        with tk.use_backend(backend):
            model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=0.5, min_features=8).to(where)
            optimizer = tdlrt.TDLRT(model, lr=0.01, tol=0.05, base=base, **({"momentum": 0.9} if base == "sgd" else {}))
            for _ in range(3):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(images.to(where)), wanted.to(where)).backward()
                optimizer.step()
            weights.append([p.detach().cpu() for p in tdlrt.to_dense(model).parameters()])
            ranks.append(tdlrt.ranks(model))
    assert ranks[0] == ranks[1]
    for actual, expected in zip(*weights, strict=True):  # three steps carry the rounding of one a thousandfold at most
        assert_close(actual, expected, "tucker_conv_backward", scale=1e3 * float(expected.abs().max()))


# ---- sizes beyond one call's reach ------------------------------------------------------------------------


def test_factorisations_above_the_limit_go_to_the_reference_and_say_so(device, caplog, monkeypatch):
    monkeypatch.setattr(cuda, "_LARGEST", 8)
    U, D = orthonormal(30, 5).float(), gaussian(30, 9).float()
    with caplog.at_level("WARNING", logger="tucker_kernels"):
        V, counts = tk.tangent_basis([U.to(device)], [D.to(device)])
    assert "size 9 is above 8" in caplog.text
    test_tangent_basis.check(U, D, V[0].cpu(), int(counts))


@pytest.mark.parametrize("mistake", ["one entry", "columns exchanged"])
def test_the_checks_see_planted_mistakes(mistake, device):
    A = gaussian(20, 7).float()
    U, s, Vh = (t[0].cpu() for t in tk.batched_svd([A.to(device)]))
    if mistake == "one entry":
        U[3, 4] += 1e-3
    else:
        U = U.flip(1)
    with pytest.raises(AssertionError):
        test_batched_svd.check(A, U, s, Vh)
