"""tucker_conv against F.conv1d/2d/3d with the dense weight in float64, and its core gradient against autograd."""

import functools

import oracles
import pytest
import torch
from problems import CONVS
from tolerances import assert_close

import tucker_kernels as tk

PATHS = ("auto", "chain", "fused", "reconstruct")
HALVES = [torch.bfloat16, torch.float16]
BY_NAME = {problem.name: problem for problem in CONVS}
LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced"]
conv_problems = pytest.mark.parametrize("problem", CONVS, ids=str)


def in_layout(tensor, layout):
    """The same values, laid out differently in memory."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([tensor, tensor + 1], -1)[..., 0]
    return tensor


def check_against_oracle(problem, dtype, path, layout="contiguous", function=tk.tucker_conv):
    input, core, factors, bias = problem.operands(dtype)
    y = function(in_layout(input, layout), core, factors, bias, *problem.geometry, path)
    assert y.dtype == dtype
    assert_close(y, oracles.conv(input, core, factors, bias, *problem.geometry), "tucker_conv")


@conv_problems
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_equals_the_dense_convolution(problem, path, dtype, backend):
    check_against_oracle(problem, dtype, path)


@pytest.mark.parametrize("name", ["padding", "every_number_differs", "sequence", "volume", "no_out_factor"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precisions_round_once(name, path, dtype, backend):
    check_against_oracle(BY_NAME[name], dtype, path)


@pytest.mark.parametrize("path", ["chain", "fused"])
def test_bfloat16_rounds_ties_to_even(path, backend):
    """The sums 1 + 2⁻⁸ and 1 + 2⁻⁷ + 2⁻⁸ lie in the middle of two neighbours."""
    x = torch.tensor([[1, 1 + 2**-7], [2**-8, 2**-8]], dtype=torch.bfloat16).view(1, 2, 1, 2)
    y = tk.tucker_conv(x, torch.ones(1, 2, 1, 1, dtype=torch.bfloat16), [None] * 4, path=path)
    assert y.flatten().tolist() == [1, 1 + 2**-6]


@conv_problems
@pytest.mark.parametrize("path", PATHS)
def test_gradients_equal_those_of_the_dense_convolution(problem, path, backend):
    input, core, factors, bias = problem.operands()
    operands = [x if x is None else x.requires_grad_() for x in (input, core, bias, *factors)]
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, path)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x for x in operands if x is not None], grad)
    expected = oracles.gradients(
        lambda input, core, bias, *factors: oracles.conv(input, core, factors, bias, *problem.geometry), operands, grad
    )
    expected = [x for x in expected if x is not None]
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        assert_close(actual, wanted, "tucker_conv_backward")


@pytest.mark.parametrize("path", ["chain", "fused"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted, recompute, path, backend):
    """Each operand's gradient is the same whether or not the others are asked for, images kept or computed again."""
    problem = BY_NAME["every_number_differs"]
    input, core, factors, bias = problem.operands()
    operands = [input, core, bias, factors[0], factors[1]]
    operands[wanted].requires_grad_()
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, path, recompute)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, [operands[wanted]], grad)

    def dense(input, core, bias, *factors):
        return oracles.conv(input, core, [*factors, None, None], bias, *problem.geometry)

    assert_close(actual, oracles.gradients(dense, operands, grad)[wanted], "tucker_conv_backward")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_in_lower_precision(dtype, path, backend):
    problem = BY_NAME["many_channels"]
    input, core, factors, bias = problem.operands(dtype)
    operands = [x.requires_grad_() for x in (input, core, bias, *factors[:2])]
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, path)
    grad = torch.randn_like(y)

    def dense(input, core, bias, *factors):
        return oracles.conv(input, core, [*factors, None, None], bias, *problem.geometry)

    for actual, wanted in zip(torch.autograd.grad(y, operands, grad), oracles.gradients(dense, operands, grad)):
        assert_close(actual, wanted, "tucker_conv_backward")


@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_a_core_of_rank_one_in_another_layout(path, backend):
    """Whose weight gradient torch's convolution refuses to compute."""
    x = torch.randn(2, 3, 10, 2, dtype=torch.float64)
    core = torch.randn(2, 3, 1, 3, dtype=torch.float64).permute(2, 3, 0, 1).requires_grad_()
    y = tk.tucker_conv(x, core, [None] * 4, padding=1, path=path)
    grad = torch.randn_like(y)
    wanted = oracles.gradients(lambda x, core: oracles.conv(x, core, [None] * 4, None, 1, 1, 1), [x, core], grad)
    assert_close(*torch.autograd.grad(y, core, grad), wanted[1], "tucker_conv_backward")


@pytest.mark.parametrize("path", ["chain", "fused"])
@pytest.mark.parametrize(
    ("dtype", "window", "padding", "stride"), [(torch.float32, 4, 3, 2), (torch.bfloat16, 3, 1, 1)]
)
def test_gradients_of_volumes_no_longer_than_the_window(dtype, window, padding, stride, path, backend):
    """torch's own weight gradient, of volumes in channels-last format, leaves parts of its result unwritten there."""
    geometry = [(value, other, other) for value, other in ((stride, 1), (padding, 0), (1, 1))]
    operands = [torch.randn(2, 6, 2, 3, 3), torch.randn(4, 5, window, 1, 1), torch.randn(7, 4), torch.randn(6, 5)]
    operands = [x.to(dtype).requires_grad_() for x in operands]

    def convolution(function, x, core, *factors):
        return function(x, core, [*factors, None, None, None], None, *geometry)

    y = convolution(functools.partial(tk.tucker_conv, path=path), *operands)
    grad = torch.randn_like(y)
    wanted = oracles.gradients(functools.partial(convolution, oracles.conv), operands, grad)
    nonsense = [torch.full((n,), torch.nan) for n in range(1, 2000, 16)]
    del nonsense  # what is left unwritten is this
    for actual, expected in zip(torch.autograd.grad(y, operands, grad), wanted):
        assert_close(actual, expected, "tucker_conv_backward")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["every_number_differs", "window_1x1", "empty_batch", "sequence", "volume"])
@pytest.mark.parametrize("path", PATHS)
def test_any_layout_of_operands_gives_the_same(layout, name, path, backend):
    check_against_oracle(BY_NAME[name], torch.float64, path, layout)


@pytest.mark.parametrize(
    "name", ["padding", "window_1x1", "window_1x1_stride", "no_in_factor", "no_out_factor", "no_factor", "volume"]
)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_memory_format_is_kept(name, path, dtype, last, backend):
    problem = BY_NAME[name]
    input, core, factors, bias = problem.operands(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats[input.ndim] if last else torch.contiguous_format
    input = input.contiguous(memory_format=wanted).requires_grad_()
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, path)
    assert y.is_contiguous(memory_format=wanted)
    if path in ("chain", "fused"):  # the others are torch's own convolutions
        (dx,) = torch.autograd.grad(y, input, torch.ones_like(y))
        assert dx.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("path", ["chain", "fused"])
def test_what_is_kept_for_the_backward_pass_has_no_gradient(path, backend):
    problem = BY_NAME["every_number_differs"]
    input, core, factors, bias = problem.operands()
    operands = [x.requires_grad_() for x in (input, core, factors[0], factors[1], bias)]
    found = tk.functions.TuckerConv.apply(*operands, *map(list, problem.geometry), path, True)
    assert [x.requires_grad for x in found] == [True, False, False]


@pytest.mark.parametrize("path", ["chain", "fused"])
def test_recomputing_keeps_no_rank_space_image(path, backend):
    problem = BY_NAME["every_number_differs"]
    input, core, factors, bias = problem.operands()
    kept = []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()), lambda x: x):
            y = tk.tucker_conv(input.requires_grad_(), core, factors, bias, *problem.geometry, path, recompute)
        kept.append(sum(sizes))
    images = core.shape[1] * input[:, 0].numel() + core.shape[0] * y[:, 0].numel()
    assert kept[0] - kept[1] == images


@conv_problems
def test_core_gradient_is_the_dense_one_in_the_bases(problem, backend):
    """⟨∇_W L, ·⟩ projected on arbitrary bases is ∇_W L ×_i U_iᵀ with ∇_W L from autograd of the dense weight."""
    input, core, factors, _ = problem.operands()
    weight = oracles.tucker_to_tensor(core, factors)
    y = oracles.conv(input, weight, [None] * weight.ndim, None, *problem.geometry)
    grad = torch.randn_like(y)
    (dense,) = oracles.gradients(
        lambda w: oracles.conv(input, w, [None] * w.ndim, None, *problem.geometry), [weight], grad
    )
    expected = dense
    for i, factor in enumerate(factors):
        if factor is not None:
            expected = oracles.mode_dot(expected, factor, i, transpose=True)
    arguments = (input, grad, factors, problem.window, *problem.geometry)
    actual = tk.tucker_conv_core_grad(*arguments)
    assert_close(actual, expected, "core_grad", scale=max(float(dense.abs().max()), 1.0))
    assert not actual.requires_grad
    expected[:1, :1] = 0
    actual = tk.tucker_conv_core_grad(*arguments, known=(1, 1))
    assert_close(actual, expected, "core_grad", scale=max(float(dense.abs().max()), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_core_gradient_in_lower_precision(dtype, backend):
    problem = BY_NAME["many_channels"]
    input, core, factors, _ = problem.operands(dtype)
    y = tk.tucker_conv(input, core, factors, None, *problem.geometry)
    grad = torch.randn_like(y)

    def weight_gradient(w):
        return oracles.conv(input, w, [None] * w.ndim, None, *problem.geometry)

    (expected,) = oracles.gradients(weight_gradient, [oracles.tucker_to_tensor(core, factors)], grad)
    for i, factor in enumerate(factors[:2]):
        expected = oracles.mode_dot(expected, factor, i, transpose=True)
    actual = tk.tucker_conv_core_grad(input, grad, factors, problem.window, *problem.geometry)
    assert_close(actual, expected, "core_grad")


def test_the_window_of_the_core_gradient_follows_from_its_factors(backend):
    problem = BY_NAME["window_factors"]
    input, core, factors, _ = problem.operands()
    grad = torch.randn_like(oracles.conv(input, core, factors, None, *problem.geometry))
    given = tk.tucker_conv_core_grad(input, grad, factors, problem.window, *problem.geometry)
    assert torch.equal(tk.tucker_conv_core_grad(input, grad, factors, None, *problem.geometry), given)


def test_compiled_once_for_images_of_several_sizes():
    """From the second on sizes are symbols, and so are the times by which a path is chosen."""
    core, u_out, u_in = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 3, 3), (5, 2), (4, 3)))
    factors = [u_out, u_in, None, None]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: tk.tucker_conv(x, core, factors), fullgraph=True, backend="aot_eager")
    for size in (8, 9, 12):
        input = torch.randn(2, 4, size, size, dtype=torch.float64, requires_grad=True)
        y, expected = compiled(input), oracles.conv(input, core, factors, None, (1, 1), (0, 0), (1, 1))
        assert_close(y.detach(), expected.detach(), "tucker_conv")
        assert_close(*(torch.autograd.grad(result.sum(), input)[0] for result in (y, expected)), "tucker_conv_backward")


MISTAKES = {
    "stride and dilation swapped": lambda x, c, f, b, s, p, d, path: tk.tucker_conv(
        x, c, f, b, (1, 2), p, (2, 1), path
    ),
    "padding swapped": lambda x, c, f, b, s, p, d, path: tk.tucker_conv(x, c, f, b, s, p[::-1], d, path),
    "no bias": lambda x, c, f, b, s, p, d, path: tk.tucker_conv(x, c, f, None, s, p, d, path),
    "window flipped": lambda x, c, f, b, s, p, d, path: tk.tucker_conv(x, c.flip(2), f, b, s, p, d, path),
    "output ranks permuted": lambda x, c, f, b, s, p, d, path: tk.tucker_conv(x, c.flip(0), f, b, s, p, d, path),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_rejects(mistake):
    with pytest.raises(AssertionError):
        check_against_oracle(BY_NAME["every_number_differs"], torch.float64, "chain", function=MISTAKES[mistake])
