"""The device kernel `project_out` against float64, in all thread orders.

With the unit roundoff u of the type, one pass leaves √n u of every column, whatever is taken out.
"""

import numpy as np
import pytest

from emu import emulator

COLUMNS, CHUNK, THREADS = 16, 128, 256


def run(problems, dtype, normalise=True, passes=2, in_memory=False, grid=3):
    """(w, flag) of every (U, D), in one launch."""
    rows, tiles, found, largest = [], 0, [], 0
    for U, D in problems:
        n, r, cols = *U.shape, D.shape[1]
        out, flag = np.full((n, cols), np.nan, dtype), np.zeros(1, np.int32)
        strips = max(1, -(-cols // COLUMNS))
        work = np.full((strips, n, COLUMNS), np.nan, dtype) if in_memory else None
        row = emulator.problem(d=D, u=U, out=out, work=work, flag=flag, n=n, r=r, cols=cols, first_tile=tiles)
        row |= emulator.problem(d_row=D.strides[0] // D.itemsize, d_col=D.strides[1] // D.itemsize)
        rows.append(row | emulator.problem(normalise=int(normalise), passes=passes))
        tiles += strips
        largest = max(largest, 0 if in_memory else n)
        found.append((out, flag))
    shared = (largest + CHUNK) * COLUMNS * np.dtype(dtype).itemsize
    emulator.launch("project_out", dtype, rows, tiles, grid=min(grid, tiles), block=THREADS, shared=shared)
    return [(out, int(flag[0])) for out, flag in found]


def orthonormal(n, r, dtype, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))[0].astype(dtype)


def normal(n, cols, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal((n, cols)).astype(dtype)


def assert_projected(U, D, w, normalise=True):
    U, D = U.astype(np.float64), D.astype(np.float64)
    if normalise:
        D = D / np.linalg.norm(D, axis=0)
    expected = D - U @ (U.T @ D)
    bound = 4 * np.sqrt(len(D)) * np.finfo(w.dtype).eps
    assert (np.abs(w - expected).max(0) <= bound * np.linalg.norm(D, axis=0)).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("in_memory", [False, True])
def test_ragged_sizes_in_one_launch(in_memory, dtype, order):
    emulator.set_thread_order(order)
    problems = [(orthonormal(n, r, dtype), normal(n, c, dtype)) for n, r, c in ((9, 3, 2), (20, 5, 17), (7, 0, 3))]
    for (U, D), (w, flag) in zip(problems, run(problems, dtype, in_memory=in_memory)):
        assert flag == 0
        assert_projected(U, D, w)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_columns_of_u_than_one_chunk(dtype):
    U, D = orthonormal(300, 270, dtype), normal(300, 33, dtype)
    ((w, _),) = run([(U, D)], dtype)
    assert_projected(U, D, w)
    ((alone, _),) = run([(U, np.ascontiguousarray(D[:, :16]))], dtype, grid=1)
    assert np.array_equal(alone, w[:, :16]), "a strip does not depend on the grid or on other strips"


def test_strided_directions_and_lengths_kept():
    U, D = orthonormal(40, 8, np.float32), np.ascontiguousarray(normal(40, 20, np.float32).T).T
    ((w, _),) = run([(U, D)], np.float32, normalise=False, passes=1)
    assert_projected(U, D, w, normalise=False)


def test_rows_that_lie_far_apart(tmp_path):
    U, D = orthonormal(4, 2, np.float32), normal(4, 3, np.float32)
    ((w, _),) = run([(U, emulator.far_rows(D, tmp_path / "d"))], np.float32)
    assert_projected(U, D, w)


def test_lengths_from_denormal_to_large():
    D = normal(30, 5, np.float32) * np.array([1e-45, 1e-25, 1, 1e18, 1e37], np.float32)
    ((w, flag),) = run([(np.zeros((30, 0), np.float32), D)], np.float32)
    assert flag == 0
    assert not w[:, 0].any()
    assert np.allclose(np.linalg.norm(w[:, 1:].astype(np.float64), axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["u", "d", "u without directions"])
def test_not_finite_sets_its_own_flag(bad, where):
    U, D = orthonormal(20, 6, np.float32), normal(20, 18, np.float32)
    spoilt_u, spoilt_d = U.copy(), D[:, :0].copy() if "without" in where else D.copy()
    (spoilt_d if where == "d" else spoilt_u)[19, 5] = bad
    flags = [flag for _, flag in run([(U, D), (spoilt_u, spoilt_d), (U, D)], np.float32)]
    assert flags == [0, 1, 0]


def test_the_oracle_sees_one_pass_too_few_rows():
    U, D = orthonormal(40, 8, np.float32), normal(40, 3, np.float32)
    ((w, _),) = run([(np.concatenate([U[:39], 0 * U[:1]]), D)], np.float32)
    with pytest.raises(AssertionError):
        assert_projected(U, D, w)
