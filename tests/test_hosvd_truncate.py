"""hosvd_truncate: ranks of a float64 SVD, error never above the bound and reported as it is, orthonormal bases."""

import itertools
import math

import pytest
import torch
from matrix_families import cores, gaussian, geometric, orthonormal
from tolerances import TOLERANCES

import tucker_kernels as tk

DTYPES = (torch.float32, torch.float64)
BACKENDS = ("reference", "cpu")
CORES = cores()


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2)) if min(matrix.shape) else 0.0


def tails(core, mode):
    """Σ_{j≥k} σ_j² for k = 0, 1, …, n, by a float64 SVD of the unfolding."""
    n = core.shape[mode]
    sigma = torch.linalg.svdvals(core.double().movedim(mode, 0).reshape(n, -1))
    energy = torch.zeros(n + 1, dtype=torch.float64)
    energy[: len(sigma)] = sigma**2
    return energy.flip(0).cumsum(0).flip(0)


def feasible(ranks, truncated):
    ranks = list(ranks)
    while over := [i for i in truncated if ranks[i] > math.prod(ranks) // ranks[i]]:
        ranks[over[0]] = math.prod(ranks) // ranks[over[0]]
    return ranks


def expected_ranks(core, tol, truncated, lower, upper, per_mode, slack):
    """Ranks for a bound that is larger by the part `slack` (smaller, if negative)."""
    norm = float(core.double().norm())
    bound = tol**2 * norm**2 / (1 if per_mode else max(len(truncated), 1)) * (1 + slack)
    ranks = list(core.shape)
    for i in truncated:
        noise = core.shape[i] * torch.finfo(torch.float64).eps * norm
        wanted = int((tails(core, i)[:-1] > max(bound, noise**2)).sum())
        ranks[i] = max(min(wanted, upper[i]), lower[i])
    return feasible(ranks, truncated)


def check(core, result, tol=None, ranks=None, truncated=None, lower=None, upper=None, per_mode=False, more=0):
    """The contract; `more` columns above the optimal rank are allowed (after a warm start)."""
    new, projections, found, error = result
    d, dtype = core.ndim, core.dtype
    truncated = list(range(d)) if truncated is None else truncated
    lower = lower or [1] * d
    upper = upper or list(core.shape)
    unit = torch.finfo(dtype).eps
    wide = core.double()
    norm = float(wide.norm())
    assert found[d:] == [0] * (len(found) - d)
    found = found[:d]
    assert new.shape == core.shape
    outside = new.clone()
    outside[tuple(slice(0, r) for r in found)] = 0
    assert not outside.any(), "the core is not zero beyond its ranks"
    back = new.double()
    forward = wide
    for i in range(d):
        if i not in truncated:
            assert projections[i] is None
            assert found[i] == core.shape[i]
            continue
        P = projections[i]
        assert P.shape == (core.shape[i],) * 2
        assert not P[:, found[i] :].any(), "a projection is not zero beyond its rank"
        kept = P[:, : found[i]].double()
        defect = spectral(kept.T @ kept - torch.eye(found[i], dtype=torch.float64))
        assert defect <= TOLERANCES["orthogonality"][dtype], f"projection {i} is orthonormal to {defect:.1e} only"
        forward = torch.tensordot(P.double().T, forward, dims=([1], [i])).movedim(0, i)
        back = torch.tensordot(P.double(), back, dims=([1], [i])).movedim(0, i)
    own = TOLERANCES["factorisation"][dtype]
    assert float((new.double() - forward).norm()) <= own * norm, "the new core is not the projected one"
    true = float((wide - back).norm()) / norm if norm else 0.0
    assert abs(error - true) <= 1e-3 * true + 8 * unit, f"error {error:.3e} reported, {true:.3e} true"
    if tol is not None:
        allowed = tol * (math.sqrt(len(truncated)) if per_mode else 1)
        clamped = upper != list(core.shape)
        assert clamped or true <= allowed * (1 + 1e-6) + 64 * unit, f"error {true:.3e} exceeds the tolerance {tol}"
        # A bound looser by 1e-6 needs no higher ranks, and a tighter one no lower ranks, unless a tail ties with it.
        few = expected_ranks(core, tol, truncated, lower, upper, per_mode, 1e-6)
        many = expected_ranks(core, tol, truncated, lower, upper, per_mode, -1e-6)
        assert all(a <= r <= b + more for a, r, b in zip(few, found, many)), f"ranks {found}, not {few}"
    if ranks is not None:
        wanted = [min(r, n) if i in truncated else n for i, (r, n) in enumerate(zip(ranks, core.shape))]
        assert found == feasible(wanted, truncated), f"ranks {found}, not {feasible(wanted, truncated)}"
        best = math.sqrt(sum(float(tails(core, i)[wanted[i]]) for i in truncated)) / norm if norm else 0.0
        assert true <= best * (1 + 1e-4) + 64 * unit, f"error {true:.3e}; leading vectors have {best:.3e}"
    return true


def run_all(dtype, backend="cpu", **arguments):
    inputs = {name: core.to(dtype) for name, core in CORES.items()}
    with tk.use_backend(backend):
        new, projections, ranks, error = tk.hosvd_truncate(list(inputs.values()), **arguments)
    assert ranks.dtype == torch.int64
    assert error.dtype == torch.float64
    return {
        name: (core, (n, p, r, e))
        for (name, core), n, p, r, e in zip(inputs.items(), new, projections, ranks.tolist(), error.tolist())
    }


def check_all(results, **arguments):
    for name, (core, result) in results.items():
        try:
            check(core, result, **arguments)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("tol", [0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_within_the_tolerance(dtype, backend, tol):
    check_all(run_all(dtype, backend, tol=tol), tol=tol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tolerances_that_a_gram_matrix_cannot_see(backend):
    for tol in (1e-8, 1e-10):
        check_all(run_all(torch.float64, backend, tol=tol), tol=tol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_zero_keeps_everything_but_exact_deficiency(dtype, backend):
    results = run_all(dtype, backend, tol=0.0)
    for core, result in results.values():
        assert check(core, result) <= 64 * torch.finfo(dtype).eps
    for name in ("flat", "geometric 1e-2", "cube"):
        core, (_, _, ranks, _) = results[name]
        assert ranks[: core.ndim] == feasible(core.shape, range(core.ndim))
    if dtype == torch.float64:
        assert results["deficient"][1][2][:3] == [4, 6, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_mode_bounds_each_modes_error(dtype, backend):
    check_all(run_all(dtype, backend, tol=0.05, tolerance_mode="per_mode"), tol=0.05, per_mode=True)


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_ranks_are_kept(dtype, backend, rank):
    for name, (core, result) in run_all(dtype, backend, ranks=rank).items():
        try:
            check(core, result, ranks=[rank] * core.ndim)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_on_the_ranks_and_completion(dtype, backend):
    """min_rank asks for more columns than the core has energy in; they are orthonormal all the same."""
    for name, (core, result) in run_all(dtype, backend, tol=0.1, min_rank=4).items():
        try:
            lower = [min(4, n) for n in core.shape]
            check(core, result, tol=0.1, lower=lower)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for core, result in run_all(dtype, backend, tol=1e-4, max_rank=2).values():
        check(core, result, tol=1e-4, upper=[min(2, n) for n in core.shape])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_core_keeps_the_first_unit_vectors(backend):
    core = CORES["zero"].float()
    with tk.use_backend(backend):
        (new,), (projections,), ranks, error = tk.hosvd_truncate([core], tol=0.1, min_rank=2)
    assert ranks.tolist() == [[2, 2, 2]]
    assert error.tolist() == [0.0]
    assert not new.any()
    for P, n in zip(projections, core.shape):
        expected = torch.zeros(n, n)
        expected[0, 0] = expected[1, 1] = 1
        assert torch.equal(P.abs(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modes", [(0,), (1, 0), (-1,), (0, 2), ()])
def test_only_the_modes_named_are_cut(backend, modes):
    for name in ("geometric 1e-2", "cube", "five modes"):
        core = CORES[name].float()
        with tk.use_backend(backend):
            (new,), (projections,), ranks, error = tk.hosvd_truncate([core], tol=0.1, modes=modes)
        truncated = sorted(m % core.ndim for m in modes)
        check(core, (new, projections, ranks[0].tolist(), float(error[0])), tol=0.1, truncated=truncated)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_core_that_is_not_finite_comes_back_unchanged(bad, backend):
    good = CORES["cube"].float()
    spoilt = good.clone()
    spoilt[3, 2, 1] = bad
    with tk.use_backend(backend):
        new, projections, ranks, error = tk.hosvd_truncate([good, spoilt], tol=0.1)
    torch.testing.assert_close(new[1], spoilt, rtol=0, atol=0, equal_nan=True)
    assert ranks[1].tolist() == list(spoilt.shape)
    assert all(torch.equal(P, torch.eye(n)) for P, n in zip(projections[1], spoilt.shape))
    assert math.isnan(error[1])
    check(good, (new[0], projections[0], ranks[0].tolist(), float(error[0])), tol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_errors_are_reported_as_they_are(dtype):
    """A loss far below the rounding of |C|² − |C'|² is still right, not zero and not noise."""
    core = torch.zeros(6, 5, 4, dtype=dtype)
    core[0, 0, 0], core[1, 1, 1], core[2, 2, 2] = 1.0, 1e-2, 1e-5
    with tk.use_backend("cpu"):
        _, _, ranks, error = tk.hosvd_truncate([core], ranks=2)
    assert ranks.tolist() == [[2, 2, 2]]
    assert float(error[0]) == pytest.approx(1e-5 / math.sqrt(1 + 1e-4 + 1e-10), rel=1e-3)


def test_result_does_not_depend_on_threads_layout_or_company():
    inputs = [core.float() for core in CORES.values()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = tk.hosvd_truncate(inputs, tol=0.03)
        torch.set_num_threads(3)
        strided = [
            core.permute(*reversed(range(core.ndim))).contiguous().permute(*reversed(range(core.ndim)))
            for core in inputs
        ]
        second = tk.hosvd_truncate(strided, tol=0.03)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[3], second[3])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0]))
    for a, b in zip(first[1], second[1]):
        assert all(torch.equal(p, q) for p, q in zip(a, b))
    alone = tk.hosvd_truncate([inputs[5]], tol=0.03)
    assert torch.equal(alone[0][0], first[0][5])


def truncate(core, dtype=torch.float32, **arguments):
    (new,), (projections,), ranks, error = tk.hosvd_truncate([core.to(dtype)], **arguments)
    return new, projections, ranks[0].tolist(), float(error[0])


def warm_step(core, ranks, size, step, seed):
    """The core in HOSVD form, padded to twice its ranks, after a step of relative size `step`."""
    grown = torch.zeros(tuple(min(2 * r, n) for r, n in zip(ranks, size)), dtype=core.dtype)
    grown[tuple(slice(0, r) for r in ranks)] = core[tuple(slice(0, r) for r in ranks)]
    change = gaussian(*grown.shape, seed=seed).to(core.dtype)
    return grown + step * change * (core.norm() / change.norm())


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("tol", [0.2, 0.1, 0.03, 0.01])
def test_a_warm_core_keeps_the_bound_and_at_most_one_column_more(step, tol):
    """Cores in HOSVD form after a small step: within the bound, at most one column more than needed in any mode."""
    core, _, ranks, _ = truncate(CORES["large"], tol=tol)
    grown = warm_step(core, ranks, (128, 96, 3, 3), step, 5)
    check(grown, truncate(grown, tol=tol), tol=tol, more=1)


def second_order_matrices():
    """name → [A B; D E], A 40 × 40: what is lost is E − D A⁻¹ B, of second order in B and D.

    E is zero, as the parallel integrator leaves it, or a part of D A⁻¹ B. Where A is weak that is much, and subspaces
    far from the axes lose less.
    """
    found = {}

    def add(name, A, B, D):
        for part, window in ((0, ()), (0.9, (1, 1)), (3, ())):
            core = torch.cat([torch.cat([A, B], 1), torch.cat([D, part * D @ torch.linalg.solve(A, B)], 1)])
            found[f"{name}, {part} of the corner"] = core.reshape(*core.shape, *window)

    for weakest in (1, 1e-1, 1e-2, 1e-3):
        A = geometric(40, 40, weakest, 15)
        for b, d in ((1e-1, 1e-1), (1e-2, 1e-2), (1e-1, 1e-4), (3e-1, 1e-5)):
            B, D = gaussian(40, 30, seed=16), gaussian(35, 40, seed=17)
            add(f"weakest {weakest}, steps {b} and {d}", A, b * B / B.norm(), d * D / D.norm())
    left, right = orthonormal(40, 40, 18), orthonormal(40, 40, 19)
    for weakest, b, d in itertools.product((1, 1e-1, 1e-2, 1e-3), (3e-1, 1e-2, 1e-4), (3e-1, 1e-2, 1e-4)):
        A = left * torch.tensor([1.0] * 39 + [weakest]) @ right.T  # B and D lie where it is weak
        B, D = left[:, -1:] * orthonormal(30, 1, 20).T, orthonormal(35, 1, 21) * right[:, -1:].T
        add(f"one weak value {weakest}, steps {b} and {d}", A, b * B, d * D)
    return found


def given_rank_cores():
    """name → (core, ranks): cores that were zero beyond their ranks before a small step, and some that seem so."""
    found = {}
    for name, head in {
        "flat": gaussian(40, 30, 3, 3, seed=1),
        "decaying": CORES["large"][:40, :30],
        "one mode cut": gaussian(40, 60, 3, 3, seed=2),
        "three modes": gaussian(12, 10, 11, seed=3),
        "three large modes": gaussian(18, 16, 11, seed=12),
        "a window cut": gaussian(12, 10, 2, 2, seed=4),
        "pointwise": gaussian(40, 40, 1, 1, seed=5),
        "large": gaussian(130, 70, 3, 3, seed=6),
    }.items():
        size = (80, 60, 3, 3) if head.ndim == 4 else (24, 20, 22)
        size = tuple(max(a, b) for a, b in zip(size, head.shape)) if name != "large" else (260, 140, 3, 3)
        size = size if name != "pointwise" else (80, 80, 1, 1)
        size = size if name != "three large modes" else (36, 32, 22)
        for step in (1e-1, 3e-2, 1e-2, 1e-4, 1e-6):
            found[f"{name}, step {step}"] = (warm_step(head, head.shape, size, step, 7), tuple(head.shape))
    # Singular values in the head far below those of the tail: the axes are a bad start that looks like a good one.
    for scale in (1e-2, 1e-5):
        weak = gaussian(40, 30, 3, 3, seed=8)
        weak[37:] *= scale
        found[f"weak head {scale}"] = (warm_step(weak, weak.shape, (80, 30, 3, 3), 3e-2, 9), tuple(weak.shape))
    found |= {name: (core, (40, 40, 1, 1)[: core.ndim]) for name, core in second_order_matrices().items()}
    tilted = torch.zeros(80, 60, 3, 3, dtype=torch.float64)
    tilted[:40, :30] = gaussian(40, 30, 3, 3, seed=10)
    tilted[40:, 30:] = 0.15 * gaussian(40, 30, 3, 3, seed=11)  # only where no head is
    found["all in two tails"] = (tilted, (40, 30, 3, 3))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_ranks_after_a_step(dtype):
    """Subspaces found by one orthogonal iteration lose no more than leading singular vectors may."""
    problems = given_rank_cores()
    cores = [core.to(dtype) for core, _ in problems.values()]
    new, projections, ranks, error = tk.hosvd_truncate(cores, ranks=[r for _, r in problems.values()])
    for i, (name, (_, wanted)) in enumerate(problems.items()):
        try:
            check(cores[i], (new[i], projections[i], ranks[i].tolist(), float(error[i])), ranks=wanted)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure


def stepped_families():
    """name → (core, ranks): every family cut to a part of its ranks in float64, and a step of relative size `step`."""
    found = {}
    for part in (2, 4):
        for name, core in CORES.items():
            ranks = feasible([-(-n // part) for n in core.shape], range(core.ndim))
            with tk.use_backend("reference"):
                new, _, ranks, _ = truncate(core, torch.float64, ranks=tuple(ranks))
            for step in (0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5) if core.norm() else ():
                own = tuple(ranks[: core.ndim])
                found[f"{name}, 1/{part}, step {step}"] = (warm_step(new, own, core.shape, step, 12), own)
    return found


def loss_of_the_subspaces(core, projections, ranks):
    """‖C − C ×_i Q_i Q_iᵀ‖ / ‖C‖ in float64, Q_i orthonormal with the span of the columns that were kept."""
    wide = core.double()
    kept = wide
    for i, (P, r) in enumerate(zip(projections, ranks)):
        Q = torch.linalg.qr(P[:, :r].double())[0]
        kept = torch.tensordot(Q @ Q.T, kept, dims=([1], [i])).movedim(0, i)
    return float((wide - kept).norm() / wide.norm())


@pytest.mark.parametrize("family", ["as they are", "stepped", "heads"])
def test_the_error_at_given_ranks_is_certified_in_single_precision(family):
    """To 1 %, or to rounding where nothing is lost, also where one orthogonal iteration took the place of the solve."""
    if family == "as they are":
        problems = {f"{n}, rank {r}": (c, (r,) * c.ndim) for n, c in CORES.items() if c.norm() for r in (1, 2, 3, 5, 8)}
    else:
        problems = stepped_families() if family == "stepped" else given_rank_cores()
    cores = [core.float() for core, _ in problems.values()]
    with tk.use_backend("cpu"):
        _, projections, ranks, reported = tk.hosvd_truncate(cores, ranks=[r for _, r in problems.values()])
    exact = [loss_of_the_subspaces(c, p, r) for c, p, r in zip(cores, projections, ranks.tolist())]
    wrong = {
        name: (found, true)
        for name, found, true in zip(problems, reported.tolist(), exact, strict=True)
        if abs(found - true) > 0.01 * true + 8 * torch.finfo(torch.float32).eps
    }
    assert not wrong
    assert sum(true > 1e-5 for true in exact) > 0.6 * len(exact), "nearly nothing is lost in most of these"


@pytest.mark.parametrize("corner", [0, 1e-3])
@pytest.mark.parametrize("window", [(), (1, 1)], ids=str)
def test_a_small_step_of_a_matrix_takes_no_solve(window, corner):
    """Seen by the head of a projection, which only the orthogonal iteration makes triangular."""
    core = warm_step(orthonormal(40, 40, 17), (40, 40), (80, 70), 1e-2, 18)
    core[40:, 40:] *= corner
    with tk.use_backend("cpu"):
        _, (projections,), _, _ = tk.hosvd_truncate([core.float().reshape(80, 70, *window)], ranks=40, modes=(0, 1))
    for P in projections[:2]:
        assert not P[:40, :40].tril(-1).any()


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, 25), pytest.param(torch.float32, 1000, marks=pytest.mark.long)]
)
def test_a_chain_of_warm_steps_stays_orthonormal_and_near_the_optimal_ranks(dtype, steps):
    """What training does: augment, step, truncate, carry the bases along; all checked in float64 on the way."""
    tol = 0.1
    core, projections, ranks, _ = truncate(CORES["large"], dtype, tol=tol)
    factors = [P[:, :r] for P, r in zip(projections, ranks)]
    target = CORES["large"].to(dtype)
    for step in range(steps):
        gradients = [gaussian(*u.shape, seed=4 * step + i).to(dtype) for i, u in enumerate(factors)]
        found, counts = tk.tangent_basis(factors, gradients)
        bases = [torch.cat([u, v[:, :k]], 1) for u, v, k in zip(factors, found, counts.tolist())]
        grown = torch.zeros([b.shape[1] for b in bases], dtype=dtype)
        grown[tuple(slice(0, r) for r in ranks)] = core[tuple(slice(0, r) for r in ranks)]
        aim = tk.multi_mode_dot(target, bases, transpose=True)
        noise = gaussian(*grown.shape, seed=step).to(dtype)
        grown = grown + 0.05 * (aim - grown) + 2e-3 * noise * grown.norm() / noise.norm()
        core, projections, ranks, error = truncate(grown, dtype, tol=tol)
        assert error <= tol
        if step % (steps // 5) == 0:
            check(grown, (core, projections, ranks, error), tol=tol, more=1)
        factors = [tk.mode_dot(b, P[:, :r], 1, transpose=True) for b, P, r in zip(bases, projections, ranks)]
        # One Newton step keeps what rounding takes in every product: U ← U (3I − UᵀU)/2.
        factors = [1.5 * u - 0.5 * u @ (u.T @ u) for u in factors]
    for u in factors:
        wide = u.double()
        assert spectral(wide.T @ wide - torch.eye(u.shape[1], dtype=torch.float64)) <= 1e-6


def planted():
    core = CORES["geometric 1e-2"].float()
    new, projections, ranks, error = truncate(core, tol=0.1)
    rotated = [P.clone() for P in projections]
    rotated[0] = orthonormal(24, 24, 9).float()
    rotated[0][:, ranks[0] :] = 0
    scaled = [P.clone() for P in projections]
    scaled[1][:, 0] *= 1.0001
    other = tk.hosvd_truncate([core], ranks=tuple(ranks[:4]))
    less = [ranks[0] - 1, *ranks[1:]]
    cut = tk.hosvd_truncate([core], ranks=tuple(less))
    more = [ranks[0] + 1, *ranks[1:]]
    grown = tk.hosvd_truncate([core], ranks=tuple(more))

    def unpack(result):
        return result[0][0], result[1][0], result[2][0].tolist(), float(result[3][0])

    check(core, unpack(other), tol=0.1)
    return {
        "other vectors": (core, (new, rotated, ranks, error)),
        "vectors not of length one": (core, (new, scaled, ranks, error)),
        "a rank too small": (core, unpack(cut)),
        "a rank too large": (core, unpack(grown)),
        "an error too small": (core, (new, projections, ranks, 0.9 * error)),
        "no error": (core, (new, projections, ranks, math.nan)),
        "core not projected": (core, (new * 1.001, projections, ranks, error)),
    }


@pytest.mark.parametrize("mistake", sorted(planted()))
def test_the_check_sees_planted_mistakes(mistake):
    core, result = planted()[mistake]
    with pytest.raises(AssertionError):
        check(core, result, tol=0.1)


@pytest.mark.parametrize("window", [(), (3, 3)], ids=str)
def test_what_is_strong_outside_the_given_ranks_comes_in(window, backend):
    """The core is small beyond its ranks, as after a step, but turned so far that one iteration would not do."""
    values, turn = torch.tensor([10, 1, 0.6, 0.3]), torch.eye(4)
    turn[1:3, 1:3] = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    core = torch.zeros(4, 4, *window)
    core.view(4, 4, -1)[:, :, 0] = turn * values
    (new,), _, ranks, error = tk.hosvd_truncate([core], ranks=2, modes=(0,))
    assert ranks[0, 0] == 2
    assert float(new.double().norm()) >= (1 - 1e-6) * float(values[:2].norm())
    assert float(error) <= 1.0001 * float(values[2:].norm() / values.norm())
