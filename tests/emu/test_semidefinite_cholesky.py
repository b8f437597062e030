"""The device kernel `semidefinite_cholesky` against float64 identities, in all thread orders.

L Lᵀ = G up to n u ‖G‖ in double precision (Higham, theorem 10.3), Xᵀ G X = I on the kept columns up to κ(G) u.
"""

import numpy as np
import pytest

from emu import emulator

THREADS = 512
EPS = np.finfo(np.float64).eps


def shared_bytes(n, resident):
    return n * 16 + resident * (resident + 1) // 2 * 8


def run(grams, dtype=np.float64, tolerance=0.0, relative=0.0, shift=0.0, sort=False, pack=False, near=1.0):
    """factor, inverse, rank, trace and flag of every matrix, in one launch."""
    rows, found = [], []
    for gram in grams:
        n = len(gram)
        factor, inverse = np.full((n, n), np.nan, dtype), np.full((n, n), np.nan)
        rank, trace, flag = np.full(1, -7), np.full(1, np.nan), np.zeros(1, np.int32)
        work = np.full(n * (n + 1) // 2, np.nan)
        row = emulator.problem(gram=np.ascontiguousarray(gram), work=work, inverse=inverse, factor=factor)
        row |= emulator.problem(trace=trace, rank=rank, flag=flag, tolerance=tolerance)
        rows.append(
            row
            | emulator.problem(
                relative=relative, shift=shift, size=n, sort=int(sort), pack=int(pack), resident=int(near * n)
            )
        )
        found.append((factor.T, inverse, rank, trace, flag))
    shared = max(shared_bytes(len(g), int(near * len(g))) for g in grams)
    emulator.launch("semidefinite_cholesky", dtype, rows, block=THREADS, shared=shared)
    return [(factor, inverse, int(rank[0]), trace[0], int(flag[0])) for factor, inverse, rank, trace, flag in found]


def gram_of(n, rank, seed=0, decay=0.0):
    """A semidefinite matrix with this rank whose square root has singular values from 1 down to 10^-decay."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    a = q[:, :rank] * np.logspace(0, -decay, rank) @ np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    return a @ a.T


def assert_factor(gram, factor, sort=False, tolerance=0.0):
    n = len(gram)
    assert np.abs(factor @ factor.T - gram).max() <= 4 * n * EPS * np.trace(gram) + tolerance
    order = np.argsort(-np.diag(gram), kind="stable") if sort else np.arange(n)
    assert np.array_equal(np.triu(factor[order], 1), np.zeros((n, n)))


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("near", [1.0, 0.4, 0.0])
def test_sizes_in_one_launch(order, near):
    emulator.set_thread_order(order)
    grams = [gram_of(n, n, seed=n, decay=1) for n in (1, 7, 8, 33)]
    for gram, (factor, inverse, rank, trace, flag) in zip(grams, run(grams, near=near)):
        n = len(gram)
        assert (rank, flag) == (n, 0)
        assert trace == pytest.approx(np.trace(gram), rel=1e-14)
        assert_factor(gram, factor)
        assert np.array_equal(np.tril(inverse, -1), np.zeros((n, n)))
        assert np.abs(inverse.T @ gram @ inverse - np.eye(n)).max() <= 1e-12


def test_largest_that_one_block_holds():
    n = 238
    assert shared_bytes(n, n) <= 232448 - 384 < shared_bytes(n + 1, n + 1)
    gram = gram_of(n, n, decay=2)
    ((factor, inverse, rank, *_),) = run([gram])
    assert rank == n
    assert_factor(gram, factor)
    assert np.abs(inverse.T @ gram @ inverse - np.eye(n)).max() <= 1e-10


@pytest.mark.sanitize
@pytest.mark.parametrize("pack", [False, True])
def test_dependent_columns_are_dropped(pack):
    rng = np.random.default_rng(5)
    a = rng.standard_normal((60, 30))
    a /= np.linalg.norm(a, axis=0)
    dead = [3, 8, 9, 22, 29]
    a[:, dead] = a[:, [0, 1, 2, 4, 5]] * np.sqrt(0.5) + a[:, [2, 0, 1, 5, 4]] * np.sqrt(0.5)
    gram = a.T @ a
    ((factor, inverse, rank, *_),) = run([gram], tolerance=1e-10, pack=pack)
    assert rank == 25
    assert_factor(gram, factor)
    assert not factor[:, dead].any()
    kept = np.setdiff1d(np.arange(30), dead)
    columns = np.arange(25) if pack else kept
    assert not inverse[:, np.setdiff1d(np.arange(30), columns)].any()
    assert not inverse[dead].any()
    basis = (a @ inverse)[:, columns]
    assert np.abs(basis.T @ basis - np.eye(25)).max() <= 1e-12
    assert np.abs(a - basis @ (basis.T @ a)).max() <= 1e-12


@pytest.mark.parametrize("rank", [1, 5, 20, 40])
def test_rank_of_a_gapped_spectrum(rank):
    gram = gram_of(40, rank, seed=rank, decay=2)
    ((factor, _, found, *_),) = run([gram], tolerance=1e-12, sort=True)
    assert found == np.linalg.matrix_rank(gram, hermitian=True) == rank
    assert_factor(gram, factor, sort=True, tolerance=1e-12)


def test_sorted_by_descending_diagonal_with_ties():
    diagonal = np.array([2.0, 5.0, 2.0, 7.0, 5.0, 0.0])
    ((factor, _, rank, *_),) = run([np.diag(diagonal)], sort=True)
    order = np.argsort(-diagonal, kind="stable")
    expected = np.zeros((6, 6))
    expected[order, np.arange(6)] = np.sqrt(diagonal[order])
    assert np.allclose(factor, expected, rtol=1e-15)
    assert rank == 5


@pytest.mark.parametrize("sort", [False, True])
def test_pivots_relative_to_their_own_diagonal(sort):
    """Columns of very different sizes: only those that depend on earlier ones go."""
    rng = np.random.default_rng(6)
    a = np.linalg.qr(rng.standard_normal((20, 8)))[0] * np.logspace(0, -6, 8)
    a[:, 5] = 1e-3 * a[:, 0] + 1e-12 * rng.standard_normal(20)
    a = a[:, ::-1] if sort else a  # that the order is another one than that of the matrix
    ((factor, _, rank, *_),) = run([a.T @ a], relative=1e-12, sort=sort)
    assert rank == 7
    order = np.argsort(-np.linalg.norm(a, axis=0)) if sort else np.arange(8)
    assert list(order[~factor.any(0)]) == [2 if sort else 5]


def test_a_float32_factor_is_the_rounded_double_one_and_the_inverse_stays_double():
    gram = gram_of(21, 21, decay=1)
    ((wide, wide_inverse, *_),) = run([gram])
    ((factor, inverse, *_),) = run([gram], np.float32)
    assert np.array_equal(factor, wide.astype(np.float32))
    assert np.array_equal(inverse, wide_inverse)


def test_shift_completes_the_rank():
    shift = 1e-9
    gram = gram_of(20, 6)
    one, tiny, zero = run([gram, 1e-60 * gram, np.zeros((20, 20))], shift=shift, sort=True)
    assert one[2] == tiny[2] == zero[2] == 20
    assert np.allclose(1e30 * tiny[0], one[0], rtol=0, atol=1e-9)
    assert np.abs(one[0] @ one[0].T - gram - shift * np.trace(gram) * np.eye(20)).max() <= 1e-14
    assert np.array_equal(zero[0], np.eye(20))


@pytest.mark.sanitize
@pytest.mark.parametrize("near", [1.0, 0.5])
def test_deferred_columns_are_what_the_others_leave_of_them(near):
    """(A R⁻¹)_j = a_j − its projection on the kept columns before it, and no other column notices a_j."""
    rng = np.random.default_rng(8)
    n, late = 20, [4, 9, 10, 19]
    a = np.linalg.qr(rng.standard_normal((50, n)))[0] + 0.2 * rng.standard_normal((50, n)) / 7
    small = 1e-5 * rng.standard_normal((50, len(late)))
    a[:, late] = a[:, [0, 1, 2, 3]] + small
    inverse, rank = np.full((n, n), np.nan), np.full(1, -7)
    row = emulator.problem(gram=a.T @ a, inverse=inverse, rank=rank, relative=1e-8, defer=1, size=n)
    row |= emulator.problem(resident=int(near * n), work=np.full(n * (n + 1) // 2, np.nan))
    emulator.launch("semidefinite_cholesky", np.float64, [row], block=THREADS, shared=shared_bytes(n, n))
    assert rank[0] == n
    found = a @ inverse
    kept = np.setdiff1d(np.arange(n), late)
    assert np.abs(found[:, kept].T @ found[:, kept] - np.eye(len(kept))).max() <= 1e-13
    for j in late:
        before = kept[kept < j]
        coefficients = np.linalg.lstsq(a[:, before], a[:, j], rcond=None)[0]
        expected = a[:, j] - a[:, before] @ coefficients
        assert 1e-6 < np.linalg.norm(expected) < 1e-3
        assert np.abs(found[:, j] - expected).max() <= 1e-13
    assert not np.tril(inverse, -1).any()


def test_a_shifted_zero_matrix_has_no_inverse_to_divide_by():
    n = 9
    inverse, rank = np.full((n, n), np.nan), np.full(1, -7)
    row = emulator.problem(gram=np.zeros((n, n)), inverse=inverse, rank=rank, shift=1e-9, size=n, resident=n)
    emulator.launch("semidefinite_cholesky", np.float64, [row], block=THREADS, shared=shared_bytes(n, n))
    assert rank[0] == 0
    assert not inverse.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_sets_the_flag_and_nothing_else(bad):
    gram = gram_of(12, 12)
    broken = gram.copy()
    broken[4, 4] = bad
    sick, well = run([broken, gram])
    assert (sick[2], sick[4]) == (-1, 1)
    assert np.isnan(sick[0]).all(), "outputs must be left alone"
    assert np.isnan(sick[1]).all()
    assert (well[2], well[4]) == (12, 0)


def test_a_flag_that_is_set_already_stops_a_finite_problem_too():
    inverse, rank, flag = np.full((9, 9), np.nan), np.full(1, -7), np.ones(1, np.int32)
    row = emulator.problem(gram=np.eye(9), inverse=inverse, rank=rank, flag=flag, size=9, resident=9)
    emulator.launch("semidefinite_cholesky", np.float64, [row], block=THREADS, shared=shared_bytes(9, 9))
    assert (rank[0], flag[0]) == (-1, 1)
    assert np.isnan(inverse).all()


def test_the_oracle_sees_a_wrong_entry():
    gram = gram_of(12, 12, decay=1)
    ((factor, *_),) = run([gram])
    factor = factor.copy()
    factor[7, 3] *= 1 + 1e-6
    with pytest.raises(AssertionError):
        assert_factor(gram, factor)
