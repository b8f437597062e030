"""Every kernel against float64, over dtypes, windows, geometry and ragged sizes: interpreted, or on a GPU."""

import itertools

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from tucker_kernels.triton.project_accumulate import project_accumulate
from tucker_kernels.triton.rank_space_wgrad import rank_space_wgrad
from tucker_kernels.triton.tucker_core_expand import tucker_core_expand
from tucker_kernels.triton.tucker_linear import tucker_linear, tucker_linear_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
f32, bf16 = torch.float32, torch.bfloat16

# (batch, height, width, r_in, r_out, channels), window, stride, padding, dilation
GEOMETRIES = {
    "3x3": ((2, 7, 9, 20, 24, 70), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": ((2, 8, 9, 17, 5, 33), (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((2, 6, 5, 16, 16, 40), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": ((1, 9, 8, 8, 16, 40), (1, 1), (2, 2), (0, 0), (1, 1)),
    "5x5": ((1, 11, 9, 8, 8, 33), (5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5 stride 2x1": ((1, 11, 9, 8, 8, 33), (5, 5), (2, 1), (2, 1), (1, 2)),
    "5x1": ((2, 9, 9, 16, 16, 40), (5, 1), (3, 2), (2, 0), (2, 1)),
    "dilation shares the stride's factor": ((1, 9, 9, 12, 16, 20), (3, 3), (2, 2), (2, 2), (2, 2)),
    "dilation and stride 4 and 6": ((1, 14, 13, 6, 7, 9), (3, 3), (4, 4), (3, 2), (6, 6)),
    "rank 1": ((1, 5, 5, 1, 1, 3), (3, 3), (1, 1), (1, 1), (1, 1)),
    "no padding": ((3, 5, 4, 4, 3, 6), (3, 2), (1, 1), (0, 0), (1, 1)),
}


def _operands(geometry, dtype):
    (B, H, W, r_in, r_out, n), window, *rest = GEOMETRIES[geometry]
    torch.manual_seed(0)
    z = torch.randn(B, r_in, H, W).to(dtype, memory_format=torch.channels_last)
    core = (torch.randn(r_out, r_in, *window) / (r_in * window[0] * window[1]) ** 0.5).to(dtype)
    out_factor, in_factor = (torch.randn(n, r).to(dtype) / r**0.5 for r in (r_out, r_in))
    return z, core, out_factor, in_factor, torch.randn(n).to(dtype), rest


def _rounded(tensor, dtype):
    return tensor.to(dtype).double()


def _expanded(mid, factor, bias=None):
    return F.conv2d(mid, factor.double()[:, :, None, None], None if bias is None else bias.double())


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [(g, d) for g in GEOMETRIES for d in DTYPES if d != torch.float16 or g.startswith("3x3")],
    ids=str,
)
def test_core_expand_and_its_data_gradient(geometry, dtype):
    z, core, out_factor, in_factor, bias, (stride, padding, dilation) = _operands(geometry, dtype)
    y, t = tucker_core_expand(
        z, core, out_factor, bias, stride, padding, dilation, save_intermediate=True, activation="silu"
    )
    expected = F.conv2d(z.double(), core.double(), None, stride, padding, dilation)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(t, expected, "tucker_core_expand")
    assert_close(y, F.silu(_expanded(_rounded(expected, dtype), out_factor, bias)), "tucker_core_expand")

    dt = torch.randn(expected.shape).to(dtype)
    size = tuple(z.shape[2:])
    dx, dz = tucker_core_expand(
        dt, core, in_factor, None, stride, padding, dilation, transposed_size=size, save_intermediate=True
    )
    arguments = (dt.double(), z.double(), core.double(), None, stride, padding, dilation, False, [0, 0], 1)
    expected = torch.ops.aten.convolution_backward(*arguments, [True, False, False])[0]
    assert_close(dz, expected, "tucker_core_expand")
    assert_close(dx, _expanded(_rounded(expected, dtype), in_factor), "tucker_core_expand")


@pytest.mark.parametrize("precision", ["tf32x3", "ieee", "tf32"])
def test_core_expand_takes_every_precision(precision):
    z, core, out_factor, *_ = _operands("3x3", f32)
    y, t = tucker_core_expand(z, core, out_factor, padding=(1, 1), input_precision=precision)
    assert t is None
    expected = F.conv2d(z.double(), core.double(), padding=1)
    # The interpreter multiplies in float32 whatever the precision is; what it means is checked in the compiled code.
    assert_close(y, _expanded(expected, out_factor), "tucker_core_expand" + ("_tf32" if precision == "tf32" else ""))


def test_relu_keeps_not_a_number_and_nothing_else_spreads():
    z, core, out_factor, _, bias, _ = _operands("3x3", f32)
    z[0, 3, 2, 2] = float("nan")
    y, _ = tucker_core_expand(z, core, out_factor, bias, padding=(1, 1), activation="relu")
    expected = F.relu(_expanded(F.conv2d(z.double(), core.double(), padding=1), out_factor, bias))
    assert torch.equal(y.isnan(), expected.isnan())
    assert expected.isnan().any()
    assert_close(y.nan_to_num(), expected.nan_to_num(), "tucker_core_expand")


def test_arguments_that_no_kernel_takes():
    z, core, out_factor, *_ = _operands("3x3", f32)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        tucker_core_expand(z, core, out_factor, activation="tanh")
    with pytest.raises(ValueError, match="input_precision is 'bf16'"):
        tucker_core_expand(z, core, out_factor, input_precision="bf16")
    with pytest.raises(TypeError, match="float64"):
        tucker_core_expand(z.double(), core.double(), out_factor.double())
    with pytest.raises(ValueError, match="rank 512"):
        tucker_core_expand(z, torch.randn(300, 20, 3, 3), torch.randn(4, 300))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pixels", "columns", "rank", "other"),
    [(333, 70, 20, 33), (128, 64, 16, 16), (5, 3, 1, 2), (0, 8, 4, 4), (200, 600, 40, 24), (65, 256, 64, 64)],
)
def test_project_accumulate(pixels, columns, rank, other, dtype):
    torch.manual_seed(1)
    a, basis = torch.randn(pixels, columns).to(dtype), (torch.randn(columns, rank) / columns**0.5).to(dtype)
    t = torch.randn(pixels, other).to(dtype)
    d, g = project_accumulate(a, basis, t)
    assert_close(d, a.double() @ basis.double(), "project_accumulate")
    assert_close(g, a.double().T @ t.double(), "project_accumulate")
    nothing, alone = project_accumulate(a, None, t)
    assert nothing is None
    assert_close(alone, a.double().T @ t.double(), "project_accumulate")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window", "stride", "padding", "dilation"),
    [((2, 3), (1, 1), (1, 1), (1, 1)), ((3, 1), (2, 1), (1, 0), (1, 2)), ((1, 1), (2, 2), (0, 0), (1, 1))],
)
def test_rank_space_wgrad_on_parts_and_without_the_known_block(window, stride, padding, dilation, dtype):
    torch.manual_seed(2)
    a0, a1, c0, c1 = 34, 36, 20, 40
    z = [torch.randn(2, c, 7, 6).to(dtype) for c in (c0, c1)]
    weight = torch.zeros(a0 + a1, c0 + c1, *window, dtype=torch.float64)
    both = torch.cat(z, 1).double()
    grad = torch.randn(F.conv2d(both, weight, None, stride, padding, dilation).shape).to(dtype)
    d = list(grad.split([a0, a1], 1))
    arguments = (grad.double(), both, weight, None, stride, padding, dilation, False, [0, 0], 1)
    expected = torch.ops.aten.convolution_backward(*arguments, [False, True, False])[1]
    geometry = (window, stride, padding, dilation)
    if window == (1, 1):  # in one part on each side
        assert_close(rank_space_wgrad(torch.cat(z, 1), grad, *geometry), expected, "rank_space_wgrad")
    assert_close(rank_space_wgrad(z, d, *geometry), expected, "rank_space_wgrad")
    known = torch.full((a0, c0, *window), 7.0, dtype=dtype)
    found = rank_space_wgrad(z, d, *geometry, known=known)
    assert torch.equal(found[:a0, :c0], known)
    expected[:a0, :c0] = 7.0
    assert_close(found, expected, "rank_space_wgrad")


def test_sums_over_pixels_do_not_depend_on_the_run():
    torch.manual_seed(3)
    a, t = torch.randn(1000, 40), torch.randn(1000, 16)
    first, second = (project_accumulate(a, None, t)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n_in", "n_out", "r_in", "r_out"), [(77, 50, 90, 33, 20), (3, 5, 4, 1, 2)])
def test_tucker_linear_and_its_gradients(rows, n_in, n_out, r_in, r_out, dtype):
    torch.manual_seed(4)
    shapes = [(rows, n_in), (r_out, r_in), (n_out, r_out), (n_in, r_in), (n_out,)]
    operands = [(torch.randn(s) / s[-1] ** 0.5).to(dtype) for s in shapes]
    x, core, u, v, _ = exact = [o.double().requires_grad_() for o in operands]
    expected = x @ v @ core.T @ u.T + exact[4]
    y, s, t = tucker_linear(*operands, save_intermediate=True)
    assert_close(y, expected.detach(), "tucker_linear")
    grad = torch.randn(y.shape).to(dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for got, want in zip(tucker_linear_backward(grad, *operands[:4], s, t), wanted):
        assert_close(got, want, "tucker_linear_backward")


def test_the_oracles_reject_planted_mistakes():
    torch.manual_seed(5)
    a, t = torch.randn(90, 20), torch.randn(90, 12)
    with pytest.raises(AssertionError, match="error"):  # the pixels of one side shifted by one
        assert_close(project_accumulate(a, None, t.roll(1, 0))[1], a.double().T @ t.double(), "project_accumulate")
    z, d = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7)
    expected = torch.nn.grad.conv2d_weight(z.double(), (4, 5, 3, 3), d.double(), padding=1)
    found = rank_space_wgrad(z, d, (3, 3), (1, 1), (1, 1))
    assert_close(found, expected, "rank_space_wgrad")
    with pytest.raises(AssertionError, match="error"):  # the window's axes swapped
        assert_close(found.transpose(2, 3), expected, "rank_space_wgrad")
    core, u, v = torch.randn(12, 12), torch.randn(30, 12), torch.randn(20, 12)
    expected = a.double() @ v.double() @ core.double().T @ u.double().T
    with pytest.raises(AssertionError, match="error"):  # the core transposed
        assert_close(tucker_linear(a, core.T, u, v)[0], expected, "tucker_linear")


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window", "stride", "padding", "dilation", "sizes"),
    list(
        itertools.product(
            *([(1, 1), (3, 3), (5, 5), (5, 1), (2, 3)], [(1, 1), (2, 2), (3, 1)], [(0, 0), (2, 2), (1, 0)]),
            *([(1, 1), (2, 1)], [(2, 11, 10, 40, 33, 65), (1, 9, 12, 130, 150, 24)]),
        )
    )[::11],  # coprime to the number of choices of every parameter, so each of them is met with others
)
def test_core_expand_grid(window, stride, padding, dilation, sizes, dtype):
    GEOMETRIES["grid"] = (sizes, window, stride, padding, dilation)
    test_core_expand_and_its_data_gradient("grid", dtype)
