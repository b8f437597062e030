"""multi_mode_dot against one float64 einsum after another; its order; what the CPU back end does with batches."""

import itertools

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensors
from tolerances import assert_sum_close

import tucker_kernels as tk
from tucker_kernels.library import ops
from tucker_kernels.reference import mode_order


def check(tensor, matrices, modes, transpose=False, function=tk.multi_mode_dot):
    y = function(tensor, matrices, modes=modes, transpose=transpose)
    assert y.dtype == tensor.dtype
    expected = oracles.multi_mode_dot(tensor, matrices, modes, transpose)
    magnitude = oracles.multi_mode_dot(tensor.abs(), [m.abs() for m in matrices], modes, transpose)
    # The bounds of sums that follow one another add up: n_1 + 4 + n_2 + 4 + …; two short modes may be one of up to 25.
    length = sum(tensor.shape[m] + 4 for m in modes) + 25 * (len(modes) // 2)
    assert_sum_close(y, expected, magnitude, length)
    return y


def random_matrices(tensor, modes, rows, transpose=False):
    shapes = [(tensor.shape[m], r) if transpose else (r, tensor.shape[m]) for m, r in zip(modes, rows)]
    return [torch.randn(shape).to(tensor.dtype) for shape in shapes]


@pytest.mark.parametrize("name", ["reference", "cpu"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_modes_and_layout(name, data):
    tensor = data.draw(tensors(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    modes = data.draw(st.lists(st.integers(0, tensor.ndim - 1), min_size=1, unique=True))
    rows = [data.draw(st.integers(0, 12)) for _ in modes]
    transpose = data.draw(st.booleans())
    modes = [m - tensor.ndim * data.draw(st.booleans()) for m in modes]
    with tk.use_backend(name):
        check(tensor, random_matrices(tensor, modes, rows, transpose), modes, transpose)


@pytest.mark.parametrize("ndim", [7, 8, 9, 10])
def test_any_number_of_modes_equals_einsum(ndim, backend):
    x = torch.randn([2, 3] * (ndim // 2) + [2] * (ndim % 2))
    check(x, random_matrices(x, range(ndim), [3, 2] * ndim), list(range(ndim)))


@pytest.mark.parametrize("transpose", [False, True])
def test_nine_modes_in_a_list(transpose, backend):
    """More than the compiled kernel takes, beside a tensor of three."""
    many, few = torch.randn([2, 3] * 4 + [2], dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    modes = [[1, 8], [2]]
    matrices = [random_matrices(x, own, [4, 3], transpose) for x, own in zip((many, few), modes)]
    flat = [[x for own in lists for x in own] for lists in (matrices, modes)]
    found = ops.grouped_mode_dot([many, few], flat[0], [2, 1], flat[1], transpose)
    for y, x, own, places in zip(found, (many, few), matrices, modes, strict=True):
        assert torch.allclose(y, oracles.multi_mode_dot(x, own, places, transpose), rtol=0, atol=1e-12)


def test_memory_format_is_kept(backend):
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    y = check(x, random_matrices(x, [1, 3], [4, 2]), [1, 3])
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_none_skip_and_default_modes(backend):
    x = torch.randn(4, 5, 6)
    a, b, c = random_matrices(x, [0, 1, 2], [3, 2, 7])
    expected = oracles.multi_mode_dot(x, [a, c], [0, 2])
    for y in (tk.multi_mode_dot(x, [a, None, c]), tk.multi_mode_dot(x, [a, b, c], skip=1)):
        assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert tk.multi_mode_dot(x, [None, None]) is x


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("shape", "modes", "rows"),
    [
        ((300, 16, 20), [1, 2], [8, 12]),  # slabs of a batch that go through the whole chain
        ((5, 40, 300, 70), [1, 2, 3], [30, 20, 50]),  # a batch whose intermediates are larger than a slab
        ((90, 80, 9), [0, 1, 2], [30, 100, 5]),  # no batch
        ((1, 64, 64, 3, 3), [1, 2], [16, 128]),
        ((60, 50, 3, 3), [0, 1, 2, 3], [16, 70, 2, 3]),  # the window modes are merged
        ((50, 3, 4), [1, 2], [30, 20]),  # short modes with too many rows to be
        ((300, 4, 7, 6), [1, 2, 3], [8, 14, 12]),  # intermediates that grow
    ],
)
def test_threads_change_no_bit(shape, modes, rows, transpose):
    x = torch.randn(shape)
    matrices = random_matrices(x, modes, rows, transpose)
    alone = check(x, matrices, modes, transpose)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(tk.multi_mode_dot(x, matrices, modes=modes, transpose=transpose), alone)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5))
def test_order_is_the_cheapest_of_all(pairs):
    def operations(order):
        sizes, total = [n for _, n in pairs], 0
        for k in order:
            total += torch.Size(sizes).numel() * pairs[k][0]
            sizes[k] = pairs[k][0]
        return total

    chosen = mode_order([n for _, n in pairs], pairs, list(range(len(pairs))), False)
    assert operations(chosen) == min(map(operations, itertools.permutations(range(len(pairs)))))


@pytest.mark.parametrize("transpose", [False, True])
def test_first_and_second_derivatives_are_exact(transpose, backend):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    matrices = [m.double().requires_grad_() for m in random_matrices(x, [0, 2], [2, 3], transpose)]
    function = lambda x, *ms: tk.multi_mode_dot(x, ms, modes=[0, 2], transpose=transpose)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *matrices))
    assert torch.autograd.gradgradcheck(function, (x, *matrices))


def test_errors_name_the_argument():
    x = torch.randn(3, 4)
    a, b = torch.randn(2, 3), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"modes has 1 entries, but matrices has 2"):
        tk.multi_mode_dot(x, [a, b], modes=[0])
    with pytest.raises(ValueError, match=r"each mode may be named once"):
        tk.multi_mode_dot(x, [a, a], modes=[0, -2])
    with pytest.raises(ValueError, match=r"modes\[1\] is 2; allowed are -2 to 1"):
        tk.multi_mode_dot(x, [a, b], modes=[0, 2])
    with pytest.raises(ValueError, match=r"matrices\[1\] has 3 columns, but mode 1 of tensor has size 4"):
        tk.multi_mode_dot(x, [a, a])
    with pytest.raises(ValueError, match=r"skip is 2; allowed are -2 to 1"):
        tk.multi_mode_dot(x, [a, b], skip=2)


@pytest.mark.parametrize("mistake", ["one matrix left out", "modes exchanged", "rounded between products"])
def test_oracle_catches(mistake):
    def wrong(tensor, matrices, modes, transpose):
        if mistake == "one matrix left out":
            return tk.multi_mode_dot(tensor, matrices[:-1], modes[:-1])
        if mistake == "modes exchanged":
            return tk.multi_mode_dot(tensor, matrices[::-1], modes)
        return tk.mode_dot(tk.mode_dot(tensor, matrices[0], 0).bfloat16().float(), matrices[1], 1)

    x = torch.randn(6, 6, 6)
    with pytest.raises(AssertionError):
        check(x, random_matrices(x, [0, 1], [6, 6]), [0, 1], function=wrong)
