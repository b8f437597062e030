"""mode_dot against torch.einsum in float64: layouts, sizes at every edge of the blocking, threads and derivatives."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensors
from tolerances import assert_sum_close

import tucker_kernels as tk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(tensor, matrix, mode, transpose=False, function=tk.mode_dot):
    y = function(tensor, matrix, mode, transpose)
    assert y.dtype == tensor.dtype
    expected = oracles.mode_dot(tensor, matrix, mode, transpose)
    magnitude = oracles.mode_dot(tensor.abs(), matrix.abs(), mode, transpose)
    assert_sum_close(y, expected, magnitude, tensor.shape[mode])
    return y


@pytest.mark.parametrize("name", ["reference", "cpu"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_mode_and_layout(name, data):
    tensor = data.draw(tensors(dtypes=DTYPES))
    mode = data.draw(st.integers(-tensor.ndim, tensor.ndim - 1))
    rows, transpose = data.draw(st.integers(0, 40)), data.draw(st.booleans())
    n = tensor.shape[mode]
    matrix = torch.randn((n, rows) if transpose else (rows, n)).to(tensor.dtype)
    if data.draw(st.booleans()):
        matrix = matrix.T.contiguous().T
    with tk.use_backend(name):
        check(tensor, matrix, mode, transpose)


# The micro-kernel's tile is at most 6 rows by 64 columns; blocks are 252 rows and 256 deep.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_tile_edge(dtype):
    for rows in range(1, 15):
        for columns in range(1, 71):
            n = (rows * columns) % 13 + 1
            x, m = torch.randn(n, columns, dtype=dtype), torch.randn(rows, n, dtype=dtype)
            check(x, m, 0)
            check(x.T.contiguous(), m, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [255, 256, 257, 513])
@pytest.mark.parametrize("rows", [251, 252, 253, 505])
@pytest.mark.parametrize("transpose", [False, True])
def test_every_block_edge(rows, n, transpose, dtype):
    m = torch.randn(*((n, rows) if transpose else (rows, n)), dtype=dtype)
    check(torch.randn(n, 65, dtype=dtype), m, 0, transpose)
    check(torch.randn(65, n, dtype=dtype), m, 1, transpose)


@pytest.mark.parametrize("inner", [1, 2, 3, 9, 15, 16, 17, 25, 49, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [3, 4, 40])
def test_every_length_of_the_inner_dimensions(inner, rows, dtype):
    check(torch.randn(70, 11, inner, dtype=dtype), torch.randn(rows, 11, dtype=dtype), 1)


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 6, 5), (2, 7, 3, 4, 5)])
def test_memory_format_is_kept(shape, backend):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = torch.randn(shape)
    kinds = [x, x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))]
    if x.ndim in formats:
        kinds.append(x.contiguous(memory_format=formats[x.ndim]))
    for kind in kinds:
        order = sorted(range(x.ndim), key=lambda i: -kind.stride(i))
        for mode in range(x.ndim):
            y = check(kind, torch.randn(4, shape[mode]), mode)
            assert sorted(range(x.ndim), key=lambda i: -y.stride(i)) == order
            assert y.permute(order).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 7, 6), (2, 7, 6, 5)])
def test_a_result_may_be_changed_in_place(shape, backend):
    """In whatever layout: autograd refuses it for a view that a Function returned."""
    x = torch.randn(shape, dtype=torch.float64).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    m = torch.randn(4, 7, dtype=torch.float64)
    y = tk.mode_dot(x, m, 1)
    y.mul_(2)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, 2 * m.sum(0).view(-1, *[1] * (x.ndim - 2)).expand_as(x))


@pytest.mark.parametrize(
    ("shape", "mode", "rows"),
    [((64, 96, 200), 1, 32), ((5, 96, 3000), 1, 32), ((3000, 128), 1, 40), ((400, 64, 9), 1, 32), ((300, 5000), 0, 16)],
)
def test_threads_change_no_bit(shape, mode, rows):
    x, m = torch.randn(shape), torch.randn(rows, shape[mode])
    alone = check(x, m, mode)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(tk.mode_dot(x, m, mode), alone)


def test_nan_and_infinity_stay_where_they_belong(backend):
    x = torch.randn(3, 20, 70)
    x[1, 4, 33] = torch.nan
    x[2, 5, 66] = torch.inf
    y = tk.mode_dot(x, torch.rand(13, 20) + 1, 1)
    expected = torch.ones_like(y, dtype=torch.bool)
    expected[1, :, 33] = expected[2, :, 66] = False
    assert torch.equal(y.isfinite(), expected)
    assert y[1, :, 33].isnan().all()
    assert y[2, :, 66].isposinf().all()


def test_empty_sum_is_zero(backend):
    y = tk.mode_dot(torch.randn(3, 0, 5), torch.randn(4, 0), 1)
    assert torch.equal(y, torch.zeros(3, 4, 5))


@pytest.mark.parametrize("transpose", [False, True])
def test_first_and_second_derivatives_are_exact(transpose, backend):
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    m = torch.randn(*((4, 5) if transpose else (5, 4)), dtype=torch.float64, requires_grad=True)
    function = lambda x, m: tk.mode_dot(x, m, 1, transpose)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, m))
    assert torch.autograd.gradgradcheck(function, (x, m))


def test_errors_name_the_argument():
    x, m = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"mode is 2; allowed are -2 to 1"):
        tk.mode_dot(x, m, 2)
    with pytest.raises(TypeError, match="mode must be an integer"):
        tk.mode_dot(x, m, 1.0)
    with pytest.raises(ValueError, match="matrix has 4 columns, but mode 0 of tensor has size 3"):
        tk.mode_dot(x, m, 0)
    with pytest.raises(ValueError, match="matrix has 5 rows, but mode 1 of tensor has size 4"):
        tk.mode_dot(x, m, 1, transpose=True)
    with pytest.raises(TypeError, match=r"matrix has dtype torch.float64, but tensor has torch.float32"):
        tk.mode_dot(x, m.double(), 1)
    with pytest.raises(TypeError, match=r"tensor has dtype torch.int64"):
        tk.mode_dot(x.long(), m, 1)
    with pytest.raises(ValueError, match="matrix must have 2 dimensions"):
        tk.mode_dot(x, m[0], 1)


@pytest.mark.parametrize("mistake", ["transposed", "neighbouring mode", "last row missing", "rounded to bfloat16"])
def test_oracle_catches(mistake):
    def wrong(tensor, matrix, mode, transpose):
        if mistake == "transposed":
            return tk.mode_dot(tensor, matrix.T.contiguous(), mode, transpose)
        if mistake == "neighbouring mode":
            return tk.mode_dot(tensor, matrix, mode + 1, transpose)
        if mistake == "rounded to bfloat16":
            return tk.mode_dot(tensor.bfloat16().float(), matrix, mode, transpose)
        y = tk.mode_dot(tensor, matrix, mode, transpose)
        y.select(mode, -1).zero_()
        return y

    with pytest.raises(AssertionError):
        check(torch.randn(8, 8, 8), torch.randn(8, 8), 1, function=wrong)
