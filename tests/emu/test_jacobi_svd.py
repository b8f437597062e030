"""The device kernel `jacobi_svd` against a float64 SVD, in all thread orders.

Singular values are off by at most a small multiple of n u σ_1, n being the rotations a column sees in a sweep; so is
the orthogonality of vectors whose values are not tiny. The rank is the smallest that keeps the tail within the bound,
as the float64 SVD says.
"""

import math

import numpy as np
import pytest

from emu import emulator

THREADS = 512


def run(
    factors,
    dtype=np.float32,
    sweeps=15,
    bound=0.0,
    ranks=(0, 10**6),
    shift=0.0,
    traces=None,
    flags=None,
    width=0,
    progress=None,
):
    """basis, sigma and rank of every matrix, in one launch; by blocks that meet over `width` columns, 0: by one."""
    rows, found, size, blocks, shared = [], [], np.dtype(dtype).itemsize, 0, 0
    for i, a in enumerate(factors):
        n = len(a)
        factor = np.array(a.T, dtype, order="C")  # column-major
        basis, sigma, rank = np.full((n, n), np.nan, dtype), np.full(n, np.nan, dtype), np.full(1, -7)
        trace = np.array([np.sum(a.astype(np.float64) ** 2) if traces is None else traces[i]])
        flag = np.array([0 if flags is None else flags[i]], np.int32)
        row = emulator.problem(factor=factor, basis=basis, sigma=sigma, trace=trace, rank=rank, flag=flag)
        row |= emulator.problem(bound=bound, shift=shift, tolerance=8 * np.finfo(dtype).eps, size=n, sweeps=sweeps)
        counters = np.zeros(3, np.int32) if progress is None else progress
        row |= emulator.problem(min_rank=ranks[0], max_rank=ranks[1], progress=counters, width=width)
        meetings = math.ceil(n / (2 * width)) if width else 0
        rows.append(row | emulator.problem(meetings=meetings, first_block=blocks))
        found.append((basis, sigma, rank))
        columns = 2 * width or n
        shared = max(shared, columns * ((n + 2) * size + 8), n * (2 * size + 8))
        blocks += max(meetings, 1)
    emulator.launch("jacobi_svd", dtype, rows, grid=blocks, block=THREADS, shared=shared)
    return [(basis, sigma, int(rank[0])) for basis, sigma, rank in found]


def cholesky_factor(n, singular_values, seed=0):
    """The Cholesky factor, sorted by its diagonal, of a matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((n, n)))
    r = np.linalg.qr((u * singular_values) @ np.linalg.qr(rng.standard_normal((n, n)))[0].T, mode="r")
    return r.T


def assert_svd(a, basis, sigma, dtype):
    n = len(a)
    eps = np.finfo(dtype).eps
    expected = np.linalg.svd(a.astype(dtype).astype(np.float64), compute_uv=False)
    assert np.abs(sigma - expected).max() <= (n + 4) * eps * expected[0]
    big = expected > 1e-3 * expected[0]
    u = basis.astype(np.float64)[:, big]
    assert np.abs(u.T @ u - np.eye(u.shape[1])).max() <= 40 * eps
    back = u.T @ a.astype(np.float64)
    assert np.abs(np.linalg.norm(back, axis=1) - expected[big]).max() <= 2 * (n + 4) * eps * expected[0]


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize(
    ("dtype", "width"), [(np.float32, 0), (np.float32, 4), (np.float32, 8), (np.float64, 0), (np.float64, 4)]
)
def test_sizes_in_one_launch(order, dtype, width):
    emulator.set_thread_order(order)
    factors = [cholesky_factor(n, np.logspace(0, -2, n), seed=n) for n in (1, 2, 7, 16, 25)]
    for a, (basis, sigma, rank) in zip(factors, run(factors, dtype, width=width)):
        assert rank == len(a)
        assert_svd(a, basis, sigma, dtype)


def matchings(n, seed):
    """Ways to sort 0 to n−1 into pairs: neighbours at distance 1, 2, 4 and 8, and at random."""
    near = [[(i, i ^ d) for i in range(n) if i < i ^ d < n] for d in (1, 2, 4, 8)]
    shuffled = np.random.default_rng(seed).permutation(n)
    return [*near, list(zip(shuffled[: n // 2], shuffled[n // 2 :]))]


# Sizes whose columns meet in groups of 4, 2 and 1, with an even and an odd number of groups and of column blocks.
@pytest.mark.parametrize(
    ("dtype", "n", "width", "some"),
    [(np.float32, n, width, slice(0, 5)) for n, width in [(3, 0), (30, 0), (131, 0), (3, 4), (30, 4), (70, 8)]]
    + [(np.float32, n, width, slice(4, 5)) for n, width in [(256, 32), (263, 16)]]
    + [(np.float64, n, width, slice(0, 5)) for n, width in [(40, 0), (98, 0), (105, 0), (98, 16), (105, 8)]]
    + [(np.float64, 195, 32, slice(4, 5)), pytest.param(np.float32, 521, 32, slice(4, 5), marks=pytest.mark.long)],
)
def test_a_sweep_meets_every_pair(dtype, n, width, some):
    """Where only disjoint pairs of columns are not orthogonal, one sweep is enough, and A Aᵀ stays as it was."""
    rng = np.random.default_rng(n)
    u, _ = np.linalg.qr(rng.standard_normal((n, n)))
    factors = []
    for pairs in matchings(n, seed=n)[some]:
        a = u * rng.uniform(0.5, 1, n)
        for p, q in pairs:
            a[:, p] += rng.uniform(0.2, 0.9) * a[:, q]
        factors.append(a)
    for a, (basis, sigma, rank) in zip(factors, run(factors, dtype, width=width, sweeps=1)):
        assert rank == n
        basis = basis.astype(np.float64)
        assert np.abs(basis.T @ basis - np.eye(n)).max() <= 40 * np.finfo(dtype).eps
        rotated = basis * sigma
        assert np.abs(rotated @ rotated.T - a @ a.T).max() <= (n + 4) * np.finfo(dtype).eps


FAMILIES = {
    "geometric": lambda n: np.logspace(0, -6, n),
    "clustered": lambda n: np.where(np.arange(n) < n // 3, 1.0, 5e-4),
    "deficient": lambda n: np.where(np.arange(n) < n // 2, np.linspace(1, 0.1, n), 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("n", "width"), [(66, 0), (66, 8), *(pytest.param(n, 32, marks=pytest.mark.long) for n in (241, 300))]
)
def test_matrix_families(n, width, family):
    a, bound = cholesky_factor(n, FAMILIES[family](n)), 1e-8
    ((basis, sigma, rank),) = run([a], width=width, bound=bound)
    tails = np.append(np.cumsum(np.linalg.svd(a, compute_uv=False)[::-1] ** 2)[::-1], 0)
    assert rank == int(np.argmax(tails <= bound * tails[0]))
    assert_svd(a, basis, sigma, np.float32)


@pytest.mark.sanitize
@pytest.mark.parametrize(("n", "width"), [(98, 0), (98, 16), (195, 32)])
def test_smaller_groups_under_sanitizers(n, width):
    a = cholesky_factor(n, np.linspace(1, 0.5, n))
    ((basis, sigma, _),) = run([a], np.float64, width=width, sweeps=1)
    rotated = basis * sigma
    assert np.abs(rotated @ rotated.T - a @ a.T).max() <= (n + 4) * np.finfo(np.float64).eps


@pytest.mark.long
@pytest.mark.parametrize(("n", "width"), [(512, 32), (1024, 16)])
def test_large_matrices_keep_their_bound(n, width):
    bound = 1e-3
    a = cholesky_factor(n, np.logspace(0, -4, n))
    ((basis, _, rank),) = run([a], width=width, sweeps=1, bound=bound)
    kept, _ = np.linalg.qr(basis[:, :rank].astype(np.float64))
    assert np.sum((a - kept @ (kept.T @ a)) ** 2) <= bound * np.sum(a**2) * (1 + 1e-5)


@pytest.mark.parametrize("bound", [0.0, 1e-8, 1e-4, 1e-2, 0.3, 1.0])
def test_rank_is_the_smallest_within_the_bound(bound):
    n = 24
    values = np.logspace(0, -5, n)
    a = cholesky_factor(n, values)
    tails = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0)
    wanted = int(np.argmax(tails <= bound * tails[0]))
    ((basis, _, rank),) = run([a], bound=bound)
    assert rank == wanted
    assert not basis[:, rank:].any()
    ((_, _, rank),) = run([a], bound=bound, ranks=(5, 9))
    assert rank == min(max(wanted, 5), 9)


def test_a_tail_of_nothing_is_within_a_bound_of_nothing():
    ((basis, sigma, rank),) = run([np.diag([4.0, 2.0, 1.0, 0.0, 0.0])], bound=0.0)
    assert rank == 3
    assert np.array_equal(basis, np.eye(5) * (np.arange(5) < 3))
    assert np.allclose(sigma, [4, 2, 1, 0, 0], rtol=1e-6, atol=0)


def test_negative_bound_takes_the_largest_rank():
    a = cholesky_factor(12, np.logspace(0, -6, 12))
    ((basis, _, rank),) = run([a], bound=-1.0, ranks=(0, 7))
    assert rank == 7
    assert np.array_equal(np.flatnonzero(basis.any(0)), np.arange(7))


@pytest.mark.parametrize("sweeps", [0, 1, 2])
def test_bound_holds_however_few_sweeps(sweeps):
    n, bound = 20, 1e-3
    a = cholesky_factor(n, np.logspace(0, -4, n), seed=3)
    ((basis, _, rank),) = run([a], sweeps=sweeps, bound=bound)
    kept, _ = np.linalg.qr(basis[:, :rank].astype(np.float64))
    lost = np.sum((a - kept @ (kept.T @ a)) ** 2)
    assert lost <= bound * np.sum(a**2) * (1 + 1e-5)


def test_scale_does_not_matter():
    a = cholesky_factor(10, np.logspace(0, -2, 10))
    plain, tiny, huge = (run([a * scale], bound=1e-3)[0] for scale in (1.0, 1e-25, 1e25))
    for basis, sigma, rank in (tiny, huge):
        assert rank == plain[2]
        assert np.abs(basis - plain[0]).max() <= 1e-4
        assert np.allclose(sigma / sigma[0], plain[1] / plain[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [0, 4])
def test_ties_zero_and_flagged(width):
    n = 6
    equal, zero, flagged = run(
        [2 * np.eye(n), np.eye(n), np.full((n, n), np.nan)],
        bound=0.4,
        ranks=(1, n),
        traces=[4.0 * n, 0.0, np.nan],
        flags=[0, 0, 1],
        width=width,
    )
    assert np.array_equal(equal[0], np.eye(n)[:, :] * (np.arange(n) < equal[2])), "equal columns stay in order"
    assert equal[2] == 4, "two of six equal energies fit in 0.4"
    assert np.array_equal(zero[0], np.eye(n) * (np.arange(n) < 1)), "a zero matrix keeps the least rank"
    assert not zero[1].any()
    assert np.array_equal(flagged[0], np.eye(n))
    assert np.isnan(flagged[1]).all()
    assert flagged[2] == n


# 20 columns, 4 each: 3 meetings a round, 5 rounds a sweep. Turns taken, turns done, the last sweep that rotated; and
# the first two where a block waits.
@pytest.mark.parametrize(
    ("progress", "stopped"),
    [
        *[((1, 0, 0), (4, 2)), ((2, 1, 0), (4, 2)), ((4, 3, 0), (7, 5)), ((15, 14, 0), (16, 14))],
        *[((15, 14, 1), (16, 14)), ((1, 1, 0), None), ((15, 15, 0), None), ((15, 15, 1), None)],
    ],
)
def test_a_round_begins_when_the_turns_before_it_are_done(progress, stopped):
    """A turn that another block took and has not ended holds up the next round, and what the sweep has to say."""
    a, progress = np.diag(np.linspace(2, 1, 20)), np.array(progress, np.int32)
    if stopped:
        with pytest.raises(emulator.EmulationError, match="waits for one that runs only after it"):
            run([a], width=4, progress=progress)
        assert tuple(progress[:2]) == stopped
    else:
        ((basis, _, rank),) = run([a], width=4, progress=progress)
        assert rank == 20
        assert np.array_equal(basis, np.eye(20))


def test_shift_is_taken_off_the_energies():
    n, shift = 10, 1e-6
    values = np.where(np.arange(n) < 4, 1.0, 0.0)
    gram = np.diag(values**2) + shift * 4 * np.eye(n)
    ((_, sigma, rank),) = run([np.linalg.cholesky(gram)], shift=shift, traces=[4.0], bound=1e-10)
    assert rank == 4
    assert np.allclose(sigma, values, atol=1e-3)
    ((_, sigma, rank),) = run([np.linalg.cholesky(gram)], shift=2 * shift, traces=[4.0])
    assert rank == 4
    assert not sigma[4:].any(), "no energy is negative"


def test_the_oracle_sees_a_swapped_column():
    a = cholesky_factor(8, np.logspace(0, -2, 8))
    ((basis, sigma, _),) = run([a])
    with pytest.raises(AssertionError):
        assert_svd(a, basis[:, [1, 0, *range(2, 8)]], sigma, np.float32)
