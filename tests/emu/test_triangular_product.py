"""The device kernel `triangular_product` against float64: one rounding of the result is all that it may cost."""

import numpy as np
import pytest

from emu import emulator

THREADS = 128
SKIP, ZERO, SOURCE, IDENTITY, NAN = range(5)


def run(
    problems, dtype, packed=False, flag=0, on_flag=ZERO, transposed=False, of_transpose=False, grid=3, newton=False
):
    rows, tiles, found = [], 0, []
    for a, b in problems:
        m, n = a.shape
        out, flags = np.full((m, n), np.nan, dtype), np.full(1, flag, np.int32)
        written = np.full((n, m), np.nan, dtype) if transposed else out
        row = emulator.problem(a=a, b=b, out=written, flag=flags, m=m, n=n, first_tile=tiles, packed=int(packed))
        row |= emulator.problem(transposed=int(of_transpose), newton=int(newton))
        row |= emulator.problem(a_row=a.strides[0] // a.itemsize, a_col=a.strides[1] // a.itemsize, on_flag=on_flag)
        rows.append(row | emulator.problem(out_row=1 if transposed else n, out_col=m if transposed else 1))
        tiles += -(-m // 64) * -(-n // 64)
        found.append(written.T if transposed else out)
    emulator.launch("triangular_product", dtype, rows, tiles, grid=min(grid, tiles), block=THREADS)
    return found


def matrices(m, n, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, n)).astype(dtype), np.triu(rng.standard_normal((n, n)))


def assert_product(a, b, out):
    wide = a.astype(np.float64)
    bound = np.finfo(out.dtype).eps / 2 * np.abs(wide @ b) + 1e-15 * np.abs(wide) @ np.abs(b) * len(b)
    assert (np.abs(out - wide @ b) <= bound + np.finfo(out.dtype).tiny).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ragged_sizes_in_one_launch(dtype, order):
    emulator.set_thread_order(order)
    problems = [matrices(m, n, dtype) for m, n in ((5, 3), (70, 18), (1, 1))]
    for (a, b), out in zip(problems, run(problems, dtype)):
        assert_product(a, b, out)


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_beyond_one_and_strides(transposed):
    a, b = matrices(130, 140, np.float32)
    (out,) = run([(np.ascontiguousarray(a.T).T, b)], np.float32, transposed=transposed)
    assert_product(a, b, out)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_transpose_of_a_factor(dtype):
    problems = [matrices(m, n, dtype) for m, n in ((5, 3), (7, 130), (70, 18))]
    for (a, b), out in zip(problems, run(problems, dtype, of_transpose=True)):
        assert_product(a, b.T, out)
    a, b = problems[0]
    (out,) = run([(a, b.T.copy())], dtype, packed=True, of_transpose=True)
    assert_product(a, b, out)


def test_packed_factors_are_not_taken_for_triangular():
    a, b = matrices(20, 90, np.float32)
    b = np.ascontiguousarray(np.roll(b, -70, axis=1))
    (out,) = run([(a, b)], np.float32, packed=True)
    assert_product(a, b, out)


def test_a_newton_step_is_rounded_once():
    """(3 a − a aᵀa) / 2, columns of a nearly orthonormal and one zero: half a unit in the last place of the result."""
    a = np.linalg.qr(np.random.default_rng(4).standard_normal((70, 66)))[0].astype(np.float32)
    a[:, 7] = 0
    wide = a.astype(np.float64)
    (out,) = run([(a, wide.T @ wide)], np.float32, packed=True, newton=True)
    expected = 1.5 * wide - 0.5 * wide @ (wide.T @ wide)
    assert (np.abs(out - expected) <= 0.5001 * np.spacing(np.abs(expected).astype(np.float32))).all()
    assert not out[:, 7].any()


def test_rows_that_lie_far_apart(tmp_path):
    a, b = matrices(4, 5, np.float32)
    (out,) = run([(emulator.far_rows(a, tmp_path / "a"), b)], np.float32)
    assert_product(a, b, out)


def test_large_coefficients_cancel_without_loss():
    """What a nearly dependent column needs: 1e6 (x − y) with x ≈ y, to float32's rounding of the result."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(50)
    a = np.stack([x, x + 1e-6 * rng.standard_normal(50)], 1).astype(np.float32)
    (out,) = run([(a, np.array([[1.0, -1e6], [0.0, 1e6]]))], np.float32)
    expected = 1e6 * (a[:, 1].astype(np.float64) - a[:, 0])
    assert np.abs(out[:, 1] - expected).max() <= 1e-7 * np.abs(expected).max()
    rounded = a @ np.array([[1.0, -1e6], [0.0, 1e6]], np.float32)
    assert np.abs(rounded[:, 1] - expected).max() > 1e-3 * np.abs(expected).max(), "the test asks for nothing"


@pytest.mark.parametrize("on_flag", [SKIP, ZERO, IDENTITY, NAN])
def test_what_the_flag_asks_for(on_flag):
    a, b = matrices(70, 66, np.float32)
    (out,) = run([(a, b)], np.float32, flag=1, on_flag=on_flag)
    if on_flag in (SKIP, NAN):
        assert np.isnan(out).all()
    else:
        assert np.array_equal(out, np.eye(70, 66) if on_flag == IDENTITY else np.zeros((70, 66)))


def test_the_oracle_sees_a_product_in_float32():
    a, b = matrices(40, 60, np.float32)
    with pytest.raises(AssertionError):
        assert_product(a, b, (a @ b.astype(np.float32)).astype(np.float32) * np.float32(1 + 2**-22))
