"""grouped_gemm as device code on the host: every epilogue and layout against float64, in every order of the threads."""

import ctypes

import numpy as np
import pytest

from emu import emulator

pytestmark = pytest.mark.sanitize
DTYPES = {"float32": 0, "float64": 1}
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}  # relative to the largest entry, sums of up to 200 products
SOURCE, NAN = 2, 4

# GemmProblem of csrc/kernels/problems.h.
PROBLEM = np.dtype(
    [(name, np.uint64) for name in ("a", "b", "source", "out", "squares", "flag")]
    + [(name, np.int64) for name in ("a_row", "a_col", "a_col_outer", "b_row", "b_row_outer", "b_col", "b_col_outer")]
    + [(name, np.int64) for name in ("source_row", "source_col", "source_col_outer")]
    + [(name, np.int64) for name in ("out_row", "out_col", "out_col_outer")]
    + [(name, np.int32) for name in ("m", "n", "depth", "depth_inner", "n_inner", "first_tile")]
    + [("alpha", np.float32), ("beta", np.float32), ("on_flag", np.int32), ("upper", np.int32)],
    align=True,
)


def address(array):
    return array.ctypes.data


def problem(a, b, result, **more):
    """out = a b for two-dimensional arrays of any strides."""
    p = np.zeros((), PROBLEM)
    item = a.itemsize
    p["a"], p["b"], p["out"] = address(a), address(b), address(result)
    p["a_row"], p["a_col"] = (s // item for s in a.strides)
    p["b_row"], p["b_col"] = (s // item for s in b.strides)
    p["out_row"], p["out_col"] = p["source_row"], p["source_col"] = [s // item for s in result.strides]
    p["m"], p["depth"], p["n"], p["alpha"] = *a.shape, b.shape[1], 1
    for name, value in more.items():
        p[name] = address(value) if isinstance(value, np.ndarray) else value
    return p


def tiles(p):
    return -(-int(p["m"]) // 64) * -(-int(p["n"]) // 64)


def run(dtype, problems, grid=3, order="ascending"):
    table, first = np.array(problems, PROBLEM), 0
    for p in table:
        p["first_tile"] = first
        first += tiles(p)
    emulator.set_thread_order(order)
    library = emulator.library()
    assert library.tk_emu_problem_bytes(b"grouped_gemm", DTYPES[dtype]) == PROBLEM.itemsize
    grid = min(grid, max(first, 1))
    shape = (len(table), first, grid, 128)
    library.tk_emu_launch(b"grouped_gemm", DTYPES[dtype], emulator.pointer(table), *shape, ctypes.c_int64(0))
    emulator.check()


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(actual, expected):
    bound = TOLERANCE[str(actual.dtype)] * max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(actual - expected).max(initial=0) <= bound


SHAPES = [(1, 1, 1), (64, 64, 16), (65, 63, 17), (3, 130, 200), (130, 3, 1), (5, 7, 0), (16, 200, 33)]


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_different_sizes_in_one_call(dtype, order):
    operands = [(normal((m, k), dtype), normal((k, n), dtype, 1)) for m, n, k in SHAPES]
    outs = [np.full((a.shape[0], b.shape[1]), np.nan, dtype) for a, b in operands]
    run(dtype, [problem(a, b, out) for (a, b), out in zip(operands, outs)], order=order)
    for (a, b), out in zip(operands, outs):
        close(out, a.astype(float) @ b.astype(float))


@pytest.mark.parametrize("grid", [1, 2, 100])
def test_the_grid_does_not_change_a_bit(grid):
    a, b = normal((70, 40), "float32"), normal((40, 130), "float32", 1)
    outs = np.empty((2, 70, 130), "float32")
    run("float32", [problem(a, b, outs[0])], grid=grid)
    run("float32", [problem(a, b, outs[1])], grid=5)
    assert np.array_equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a_t", "b_t", "out_t"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)])
def test_any_strides(dtype, a_t, b_t, out_t):
    a = normal((40, 70), dtype).T if a_t else normal((70, 40), dtype)
    b = normal((66, 40), dtype, 1).T if b_t else normal((40, 66), dtype, 1)
    out = np.empty((66, 70), dtype).T if out_t else np.empty((70, 66), dtype)
    run(dtype, [problem(a, b, out)])
    close(out, a.astype(float) @ b.astype(float))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_over_two_dimensions(dtype):
    """An n-mode product: out[o,r,i] = Σ_k m[r,k] x[o,k,i], where it lies."""
    x, m = normal((5, 30, 13), dtype), normal((20, 30), dtype, 1)
    out = np.full((5, 20, 13), np.nan, dtype)
    p = problem(m, x[0], out[0], n=5 * 13, n_inner=13, b_col_outer=30 * 13, out_col_outer=20 * 13)
    run(dtype, [p])
    close(out, np.einsum("rk,oki->ori", m.astype(float), x.astype(float)))


@pytest.mark.parametrize("flagged", [0, 1])
def test_the_source_has_columns_over_two_dimensions_too(flagged):
    """As where a truncated core goes back, or stays as it was because it is not finite."""
    x, m, source = normal((5, 30, 13), "float32"), normal((20, 30), "float32", 1), normal((5, 20, 13), "float32", 2)
    out, flag = np.full((5, 20, 13), np.nan, "float32"), np.full(1, flagged, np.int32)
    p = problem(m, x[0], out[0], n=5 * 13, n_inner=13, b_col_outer=30 * 13, out_col_outer=20 * 13, on_flag=SOURCE)
    p["source"], p["source_col_outer"], p["flag"] = address(source), 20 * 13, address(flag)
    p["alpha"], p["beta"] = -1, 1
    run("float32", [p])
    close(out, source - (1 - flagged) * np.einsum("rk,oki->ori", m.astype(float), x.astype(float)))


def test_rows_that_lie_far_apart(tmp_path):
    a, b = emulator.far_rows(normal((4, 5), "float32"), tmp_path / "a"), normal((5, 6), "float32", 1)
    out = emulator.far_rows(np.full((4, 6), np.nan, "float32"), tmp_path / "out")
    run("float32", [problem(a, b, out)])
    close(out, a.astype(float) @ b.astype(float))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_over_two_dimensions(dtype):
    """A contraction over all but one mode: out[i,j] = Σ_ok a[o,i,k] b[o,j,k]."""
    a, b = normal((6, 20, 9), dtype), normal((6, 70, 9), dtype, 1)
    out = np.empty((20, 70), dtype)
    p = problem(a[0], b[0].T, out, depth=6 * 9, depth_inner=9, a_col_outer=20 * 9, b_row_outer=70 * 9)
    run(dtype, [p])
    close(out, np.einsum("oik,ojk->ij", a.astype(float), b.astype(float)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(dtype):
    """out = α a b + β source, its squares, and the upper triangle only."""
    a, b = normal((70, 20), dtype), normal((20, 90), dtype, 1)
    source = normal((90, 70), dtype, 2).T
    out, squares = np.empty((70, 90), dtype), np.full(4, np.nan)
    strides = {"source_row": source.strides[0] // a.itemsize, "source_col": source.strides[1] // a.itemsize}
    p = problem(a, b, out, source=source, squares=squares, alpha=-0.5, beta=1.5, upper=1, **strides)
    run(dtype, [p])
    product = a.astype(float) @ b.astype(float)
    expected = np.triu(-0.5 * product + 1.5 * source)
    close(out, expected)
    assert np.all(np.tril(out, -1) == 0)
    parts = [np.sum(out.astype(float)[i : i + 64, j : j + 64] ** 2) for i in (0, 64) for j in (0, 64)]
    np.testing.assert_allclose(squares, parts, rtol=1e-12)


def test_the_source_may_be_the_result():
    u, t = normal((70, 20), "float32"), normal((20, 66), "float32", 1)
    x = normal((70, 66), "float32", 2)
    expected = x.astype(float) - u.astype(float) @ t.astype(float)
    run("float32", [problem(u, t, x, source=x, alpha=-1, beta=1)])
    close(x, expected)


def test_squares_without_a_result():
    a, b = normal((5, 4), "float64"), normal((4, 3), "float64", 1)
    squares = np.empty(1)
    run("float64", [problem(a, b, np.empty((5, 3)), squares=squares, out=0)])
    np.testing.assert_allclose(squares, np.sum((a @ b) ** 2), rtol=1e-12)


@pytest.mark.parametrize("on_flag", [SOURCE, NAN])
def test_a_flagged_problem_is_replaced_and_its_neighbour_is_not(on_flag):
    a, b, source = (normal((70, 70), "float32", s) for s in range(3))
    a[0, 0] = np.nan
    out, other, flag = np.full((70, 70), 7, "float32"), np.empty((70, 70), "float32"), np.ones(1, np.int32)
    flagged = problem(a, b, out, source=source, flag=flag, on_flag=on_flag)
    run("float32", [flagged, problem(b, b, other)])
    np.testing.assert_array_equal(out, source if on_flag == SOURCE else np.full_like(out, np.nan))
    close(other, b.astype(float) @ b.astype(float))


def test_nan_and_inf_are_not_hidden():
    a, b = normal((4, 4), "float32"), normal((4, 4), "float32", 1)
    a[1, 2], b[0, 3] = np.nan, np.inf
    out = np.empty((4, 4), "float32")
    run("float32", [problem(a, b, out)])
    assert np.all(np.isnan(out[1]))
    assert not np.any(np.isfinite(out[:, 3]))


@pytest.mark.parametrize("mistake", ["m", "a_row", "depth", "b_col"])
def test_a_planted_mistake_in_the_table_shows(mistake):
    a, b = normal((70, 20), "float32"), normal((20, 66), "float32", 1)
    out = np.zeros((70, 66), "float32")
    p = problem(a, b, out)
    p[mistake] -= 1
    run("float32", [p])
    with pytest.raises(AssertionError):
        close(out, a.astype(float) @ b.astype(float))
