"""The device kernel `gram` against a float64 contraction, in all thread orders.

Products of float32 are exact in double precision, so what is left is the order of the sums: 1e-13 of ‖a_i‖‖a_j‖.
"""

import numpy as np
import pytest

from emu import emulator

TILE, THREADS = 64, 128


def lower_tiles(size):
    blocks = -(-size // TILE)
    return blocks * (blocks + 1) // 2


def run(problems, dtype, grid=3):
    """Gram matrices of (array, row, col, col_outer, inner, size, depth, splits, split_depth) by the kernel."""
    rows, tiles, grams = [], 0, []
    for a, row, col, col_outer, inner, size, depth, splits, split_depth in problems:
        gram = np.full((size, size), np.nan)
        partial = np.full((splits, size, size), np.nan)
        rows.append(
            emulator.problem(a=a, gram=gram, partial=partial, row=row, col=col, col_outer=col_outer, inner=inner)
            | emulator.problem(finished=np.zeros(lower_tiles(size), np.int32))
            | emulator.problem(size=size, depth=depth, splits=splits, split_depth=split_depth)
            | emulator.problem(first_tile=tiles)
        )
        tiles += lower_tiles(size) * splits
        grams.append(gram)
    emulator.launch("gram", dtype, rows, work=tiles, grid=min(grid, tiles), block=THREADS)
    return grams


def unfolding(tensor, mode, splits=1):
    """The mode's unfolding of a contiguous tensor, read where it lies."""
    outer, n = int(np.prod(tensor.shape[:mode])), tensor.shape[mode]
    inner = int(np.prod(tensor.shape[mode + 1 :]))
    depth = outer * inner
    col, col_outer, wrap = (1, n * inner, inner) if inner > 1 else (n, 0, 0)
    split_depth = -(-depth // splits // 16) * 16 or 16
    return tensor, inner, col, col_outer, wrap if outer > 1 else 0, n, depth, splits, split_depth


def assert_gram(gram, tensor, mode):
    flat = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    assert np.array_equal(gram, gram.T)
    assert np.all(np.abs(gram - flat @ flat.T) <= 1e-13 * np.outer(norms, norms))


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_mode_in_one_launch(order, dtype):
    emulator.set_thread_order(order)
    core = np.random.default_rng(0).standard_normal((70, 5, 3, 2)).astype(dtype)
    grams = run([unfolding(core, mode) for mode in range(4)], dtype)
    for mode, gram in enumerate(grams):
        assert_gram(gram, core, mode)


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
def test_split_depth_is_deterministic(order):
    emulator.set_thread_order(order)
    a = np.random.default_rng(1).standard_normal((9, 130)).astype(np.float32)
    split = [run([unfolding(a, 0, splits=4)], np.float32, grid)[0] for grid in (1, 4)]
    assert np.array_equal(*split)
    assert_gram(split[0], a, 0)


def test_tiles_beyond_one():
    a = np.random.default_rng(2).standard_normal((131, 40)).astype(np.float32)
    tall = np.random.default_rng(3).standard_normal((33, 129)).astype(np.float32)
    grams = run([unfolding(a, 0, splits=2), unfolding(tall, 1), unfolding(a, 0)], np.float32, grid=5)
    assert_gram(grams[0], a, 0)
    assert_gram(grams[1], tall, 1)
    assert_gram(grams[2], a, 0)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_matrix_whose_entries_32_bits_cannot_count(splits, tmp_path):
    """The last tile of 46,390 rows: beyond 46,340 of them row × size exceeds 2³¹. The file is sparse."""
    size = 46390
    memory = np.memmap(tmp_path / "grams", np.float64, "w+", shape=(1 + splits * (splits > 1), size, size))
    gram, *partial = memory
    a = np.random.default_rng(5).standard_normal((size, 16 * splits)).astype(np.float32)
    last = lower_tiles(size) - 1
    problem = emulator.problem(a=a, gram=gram, row=16 * splits, col=1, size=size, depth=16 * splits, splits=splits)
    problem |= emulator.problem(split_depth=16, first_tile=-last * splits, finished=np.zeros(last + 1, np.int32))
    if partial:
        problem["partial"] = partial[0]  # those of both parts, in order
    emulator.launch("gram", np.float32, [problem], work=splits, grid=1, block=THREADS)
    begin = size // TILE * TILE
    rows = a[begin:].astype(np.float64)
    assert np.allclose(gram[begin:, begin:], rows @ rows.T, rtol=0, atol=1e-13 * (rows**2).sum(1).max())
    assert np.array_equal(gram[begin:, begin:], gram[begin:, begin:].T)


def test_rows_that_lie_far_apart(tmp_path):
    a = np.random.default_rng(6).standard_normal((4, 20)).astype(np.float32)
    (gram,) = run([(emulator.far_rows(a, tmp_path / "a"), 2**30, 1, 0, 0, 4, 20, 1, 32)], np.float32)
    assert_gram(gram, a, 0)


def test_empty_depth():
    a = np.ones((4, 3), np.float32)
    empty = (a, 3, 1, 0, 0, 4, 0, 1, 16)
    grams = run([empty, unfolding(a, 0)], np.float32)
    assert np.array_equal(grams[0], np.zeros((4, 4)))
    assert_gram(grams[1], a, 0)


def test_not_finite_shows_on_the_diagonal():
    a = np.ones((70, 20), np.float32)
    a[66, 7], a[3, 2] = np.nan, np.inf
    (gram,) = run([unfolding(a, 0)], np.float32)
    assert list(np.flatnonzero(~np.isfinite(np.diag(gram)))) == [3, 66]


def test_the_oracle_sees_a_transposed_unfolding():
    core = np.random.default_rng(4).standard_normal((3, 3, 3)).astype(np.float32)
    (gram,) = run([unfolding(core, 1)], np.float32)
    with pytest.raises(AssertionError):
        assert_gram(gram, core, 2)
