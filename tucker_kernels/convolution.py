"""Convolutions with a Tucker weight: arguments are checked, a path is chosen, a differentiable function is called."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tucker_kernels import cost_model, reference, validation
from tucker_kernels.dispatch import chosen
from tucker_kernels.functional import Factors, check_bias, check_factors, multiply, needs_gradient
from tucker_kernels.functions import EveryNth, TuckerConv
from tucker_kernels.library import call, ops

Path = Literal["auto", "chain", "fused", "reconstruct"]
PerDimension = int | Sequence[int]  # one for all window dimensions, or one each


def _conv_geometry(input, core, stride, padding, dilation) -> tuple[list, list, list]:
    window = core.ndim - 2
    if not 1 <= window <= 3:
        raise ValueError(f"core has {core.ndim} modes; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5")
    validation.tensor("input", input, ndim=core.ndim, like=("core", core))
    if 0 in core.shape:
        raise ValueError(f"core has shape {tuple(core.shape)}; every mode needs a positive size")
    if 0 in input.shape[1:]:
        raise ValueError(f"input has shape {tuple(input.shape)}; every dimension but the batch needs a positive size")
    stride = validation.per_dimension("stride", stride, window, 1)
    padding = validation.per_dimension("padding", padding, window, 0)
    return stride, padding, validation.per_dimension("dilation", dilation, window, 1)


def _output_size(input, window, stride, padding, dilation):
    sizes = reference.output_size(input.shape[2:], window, stride, padding, dilation)
    if min(sizes) < 1:
        raise ValueError(
            f"input of size {tuple(input.shape[2:])} with padding {tuple(padding)} is smaller than the window "
            f"{tuple(window)} with dilation {tuple(dilation)}"
        )
    return sizes


def _seen_pixels(input, window, stride, padding) -> tuple[Tensor, list]:
    """(input, stride) without the pixels that a 1×1 window steps over, which would be projected in vain."""
    if max(stride) == 1 or max(window) > 1 or any(padding):
        return input, stride
    if needs_gradient(input):
        return EveryNth.apply(input, stride), [1] * len(stride)
    seen = reference.every_nth(input, stride).contiguous(memory_format=reference.format_of(input))
    return seen, [1] * len(stride)


def _asked_once_per_compilation(function):
    """`torch.compiler.assume_constant_result`, without importing the whole compiler (and Triton) for it."""
    function._dynamo_marked_constant = True
    return function


@_asked_once_per_compilation
def _has_compiled_convolution(device):
    return device == "cpu" and chosen("tucker_conv_forward", device) == "cpu"


@_asked_once_per_compilation
def _threads():
    return torch.get_num_threads()


def _cheapest_path(conv, input, training, memory):
    """The fused kernel takes part where its cost is known: on the CPU, if the compiled back end may be used."""
    fused = input.ndim <= 4 and _has_compiled_convolution(input.device.type)
    paths = ("chain", *(("fused",) if fused and input.dtype != torch.float16 else ()), "reconstruct")
    name = str(input.dtype).removeprefix("torch.")
    if memory is None or torch.compiler.is_dynamo_compiling():  # compiled once, the path stays anyway
        return cost_model.choose(conv, paths, dtype=name, training=training, threads=_threads())
    path = cost_model.choose(conv, paths, memory.get(training), dtype=name, training=training, threads=_threads())
    memory[training] = path
    return path


def tucker_conv(
    input: Tensor,
    core: Tensor,
    factors: Factors,
    bias: Tensor | None = None,
    stride: PerDimension = 1,
    padding: PerDimension = 0,
    dilation: PerDimension = 1,
    path: Path = "auto",
    recompute: bool = False,
    memory: dict | None = None,
) -> Tensor:
    """Convolution in 1, 2 or 3 dimensions with the weight `tucker_to_tensor(core, factors)`.

    Args:
        input: (batch, C_in, *size). Contiguous and channels-last inputs keep their format.
        core: (r_out, r_in, *window ranks).
        factors: [U_out (C_out, r_out), U_in (C_in, r_in), one (window, rank) per window dimension]; `None` where a
            mode is not factorised.
        bias: (C_out,) or None.
        stride, padding, dilation: an integer or one per window dimension.
        path: "chain" (1×1 → core window → 1×1), "reconstruct" (one dense convolution with the full weight), "fused"
            (the chain in one kernel, where a back end has one), or "auto": whichever `cost_model` expects to be
            fastest.
        recompute: keep no rank-space image for the backward pass but compute it again there: less memory, more time.
            With path "fused" no more is alive at once than with a dense layer; "chain" holds whole rank-space images
            while it computes them again, and can exceed that.
        memory: a dict that a layer keeps: the path in it stays until another is expected to be a tenth faster, so that
            ranks that move to and fro do not make the path do the same.

    Returns: (batch, C_out, *output size). Half precisions are accepted. Differentiable to any order.

    >>> x, core, factors = torch.randn(2, 6, 9, 9), torch.randn(4, 3, 3, 3), [torch.randn(8, 4), torch.randn(6, 3)]
    >>> y = tk.tucker_conv(x, core, [*factors, None, None], stride=2, padding=1)
    >>> weight = tk.multi_mode_dot(core, factors)
    >>> torch.allclose(y, torch.conv2d(x, weight, stride=2, padding=1), atol=1e-3)
    True
    """
    validation.tensor("core", core)
    stride, padding, dilation = _conv_geometry(input, core, stride, padding, dilation)
    check_factors("core", core, factors)
    for i, factor in enumerate(factors):
        if factor is not None and factor.shape[0] == 0:
            raise ValueError(f"factors[{i}] has 0 rows; every mode needs a positive size")
    validation.choice("path", path, ("auto", *cost_model.PATHS))
    validation.flag("recompute", recompute)
    if memory is not None and not isinstance(memory, dict):
        raise TypeError(f"memory must be a dict or None, got {type(memory).__name__}")
    out_factor, in_factor, *window_factors = factors
    n_out = core.shape[0] if out_factor is None else out_factor.shape[0]
    n_in = core.shape[1] if in_factor is None else in_factor.shape[0]
    if input.shape[1] != n_in:
        raise ValueError(f"input has {input.shape[1]} channels, but the weight takes {n_in}")
    check_bias(bias, n_out, core)
    core = multiply(core, window_factors, range(2, core.ndim), False)
    window = core.shape[2:]
    sizes = _output_size(input, window, stride, padding, dilation)
    input, stride = _seen_pixels(input, window, stride, padding)
    operands = (input, core, out_factor, in_factor, bias)
    if path == "auto":
        conv = cost_model.Conv(
            batch=input.shape[0],
            n_out=n_out,
            n_in=n_in,
            r_out=None if out_factor is None else out_factor.shape[1],
            r_in=None if in_factor is None else in_factor.shape[1],
            size=tuple(input.shape[2:]),
            out_size=tuple(sizes),
            window=tuple(window),
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
        )
        path = _cheapest_path(conv, input, needs_gradient(*operands), memory)
    if path == "reconstruct":
        weight = multiply(core, [out_factor, in_factor], (0, 1), False)
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[len(window) - 1]
        y = convolution(input, weight, bias, stride, padding, dilation)
        return y.contiguous(memory_format=reference.format_of(input))  # torch keeps it only in some dtypes
    return convolve(operands, (stride, padding, dilation), path, not recompute)


def convolve(operands, geometry, path, save):
    """The convolution by path "chain" or "fused" of arguments that were checked.

    operands: input, core, out_factor, in_factor, bias; geometry: stride, padding, dilation, a list each; save: whether
    rank-space images are kept for the backward pass.
    """
    if needs_gradient(*operands):
        return TuckerConv.apply(*operands, *geometry, path, save)[0]
    return call(ops.tucker_conv_forward.default, *operands, *geometry, path, False)[0]


def tucker_conv_core_grad(
    input: Tensor,
    grad_output: Tensor,
    factors: Factors,
    window: PerDimension | None = None,
    stride: PerDimension = 1,
    padding: PerDimension = 0,
    dilation: PerDimension = 1,
    known: Sequence[int] | None = None,
) -> Tensor:
    """Gradient of a convolution's loss with respect to a core, seen in given bases: `∇_W L ×_i U_iᵀ`.

    One layer-local contraction of the layer's input and output gradient. With augmented bases [U|V] it is the augmented
    core gradient of the one-pass step (no second forward or backward pass).

    Args:
        input: (batch, C_in, *size); grad_output: (batch, C_out, *output size), the gradient of the loss.
        factors: as in `tucker_conv`; `None` where a mode is not factorised.
        window: the full window sizes; needed for window modes without a factor, and may be left out otherwise.
        known: (output, input), how many leading channels of the two bases the caller has the gradient of. That block,
            for all of the window, is not computed but zero.

    Returns: (r_out, r_in, *window ranks). Not differentiable.
    """
    count = len(validation.sequence("factors", factors)) - 2
    if not 1 <= count <= 3:
        raise ValueError(f"factors has {count + 2} entries; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5")
    if window is None:
        window = [f.shape[0] for f in factors[2:] if f is not None]
        if len(window) < count:
            raise ValueError("window is None, but some window factor is None too; give the sizes")
    window = validation.per_dimension("window", window, count, 1)
    validation.tensor("input", input, ndim=count + 2)
    validation.tensor("grad_output", grad_output, ndim=count + 2, like=("input", input))
    stride = validation.per_dimension("stride", stride, count, 1)
    padding = validation.per_dimension("padding", padding, count, 0)
    dilation = validation.per_dimension("dilation", dilation, count, 1)
    channels = [
        (grad_output.shape[1], f"grad_output has {grad_output.shape[1]} channels"),
        (input.shape[1], f"input has {input.shape[1]} channels"),
    ]
    windows = [(k, f"window[{i}] is {k}") for i, k in enumerate(window)]
    validation.bases("factors", factors, channels + windows, ("input", input))
    expected = (input.shape[0], grad_output.shape[1], *_output_size(input, window, stride, padding, dilation))
    if tuple(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output has shape {tuple(grad_output.shape)}; for this input and window it must be {expected}"
        )
    known = [] if known is None else validation.integers("known", known)
    if known:
        ranks = [n if f is None else f.shape[1] for f, (n, _) in zip(factors, channels)]
        if len(known) != 2 or not all(0 <= k <= r for k, r in zip(known, ranks)):
            raise ValueError(f"known is {tuple(known)}; allowed are two integers from 0 to {tuple(ranks)}, or none")
    return core_gradient(input, grad_output, factors, window, (stride, padding, dilation), known)


@torch.no_grad()
def core_gradient(input, grad_output, factors, window, geometry, known):
    """`tucker_conv_core_grad` of arguments that were checked; geometry: stride, padding, dilation, a sequence each."""
    stride, padding, dilation = geometry
    input, stride = _seen_pixels(input, window, stride, padding)
    images, bases = (input, grad_output), factors[:2]
    gradient = call(ops.rank_space_wgrad.default, *images, *bases, window, stride, padding, dilation, known)
    return multiply(gradient, factors[2:], range(2, gradient.ndim), True)
