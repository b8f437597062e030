"""The `cpu` back end's convolutions: `csrc/cpu/tucker_conv.cpp` for the path "fused", and the core gradient.

The kernel reads and writes channels-last images; others are converted here. Sequences are images of one row.
"""

import torch

from tucker_kernels import cost_model, reference, tables
from tucker_kernels.cpu import run
from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, native_module

_C, _ = native_module()


def _refuse_image(image):
    """Why the kernel cannot read this image, or nothing."""
    if image.ndim > 4:
        return f"{image.ndim - 2} window dimensions, and the kernel has 1 or 2"
    if image.dtype not in CODES:
        return f"{image.dtype}, and the kernel has float32, float64 and bfloat16"
    return ""


def _refuse(image, path):
    return _refuse_image(image) if path == "fused" else f"path {path!r}, which is left to torch's convolutions"


def _image(tensor):
    """A dense channels-last image; a sequence becomes one of a single row. None for an empty tensor."""
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(2)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else None


def _new_image(like, channels, sizes):
    shape = (like.shape[0], channels, *([1] * (2 - len(sizes))), *sizes)
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _result(image, like, memory_format=None):
    """Back to the caller's number of dimensions and memory format (by default the one z and t are saved in)."""
    if like.ndim == 3:
        return image.squeeze(2).contiguous()
    return image if memory_format is None else image.contiguous(memory_format=memory_format)


def _pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _weight(tensor):
    """Weights, and their gradients, are float32 where images are bfloat16."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous()


def _conv2d(input, n_out, core_shape, out_sizes, stride, padding, dilation):
    """tk_conv2d: batch, n_in, n_out, r_in, r_out and six pairs."""
    lead = 4 - input.ndim
    pairs = ((input.shape[2:], 1), (out_sizes, 1), (core_shape[2:], 1), (stride, 1), (padding, 0), (dilation, 1))
    flat = [n for values, neutral in pairs for n in (*([neutral] * lead), *values)]
    return [input.shape[0], input.shape[1], n_out, core_shape[1], core_shape[0], *flat]


@implements("cpu", can_run=lambda *args: _refuse(args[0], args[-2]))
def tucker_conv_forward(input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save):
    sizes = reference.output_size(input.shape[2:], core.shape[2:], stride, padding, dilation)
    n_out = core.shape[0] if out_factor is None else out_factor.shape[0]
    x = _image(input)
    y = _new_image(x, n_out, sizes)
    z = _new_image(x, core.shape[1], input.shape[2:]) if save and in_factor is not None else None
    t = _new_image(x, core.shape[0], sizes) if save and out_factor is not None else None
    weights = [_weight(w) for w in (core, out_factor, in_factor, bias)]
    _C.tucker_conv_forward_cpu(
        CODES[input.dtype],
        _conv2d(input, n_out, core.shape, sizes, stride, padding, dilation),
        x.data_ptr(),
        *(_pointer(w) for w in weights),
        *(y.data_ptr(), _pointer(z), _pointer(t), torch.get_num_threads()),
    )
    return (
        _result(y, input, reference.format_of(input)),
        input.new_empty(0) if z is None else _result(z, input),
        input.new_empty(0) if t is None else _result(t, input),
    )


@implements("cpu", can_run=lambda *args: _refuse(args[1], args[-1]))
def tucker_conv_backward(grad, input, z, t, core, out_factor, in_factor, stride, padding, dilation, need, path):
    x, dy = _image(input), _image(grad)
    weights = [_weight(w) for w in (core, out_factor, in_factor)]
    wide = weights[0].dtype
    need_x, need_core, need_out, need_in, need_bias = need
    results = [
        torch.empty_like(x) if need_x else None,
        torch.empty_like(core, dtype=wide, memory_format=torch.contiguous_format) if need_core else None,
        torch.empty_like(out_factor, dtype=wide, memory_format=torch.contiguous_format) if need_out else None,
        torch.empty_like(in_factor, dtype=wide, memory_format=torch.contiguous_format) if need_in else None,
        core.new_empty(grad.shape[1], dtype=wide) if need_bias else None,
    ]
    saved = [_image(s) for s in (z, t)]
    _C.tucker_conv_backward_cpu(
        CODES[input.dtype],
        _conv2d(input, grad.shape[1], core.shape, grad.shape[2:], stride, padding, dilation),
        *(dy.data_ptr(), x.data_ptr(), *(_pointer(s) for s in saved)),
        *(_pointer(w) for w in weights),
        *([_pointer(r) for r in results], [0, 0], torch.get_num_threads()),
    )
    if need_x:
        results[0] = _result(results[0], input, reference.format_of(input))
    return tuple(input.new_empty(0) if r is None else r.to(input.dtype) for r in results)


@implements("cpu", can_run=lambda *args: _refuse_image(args[0]))
def rank_space_wgrad(input, grad, out_basis, in_basis, window, stride, padding, dilation, known=()):
    x, dy = _image(input), _image(grad)
    weights = [_weight(w) for w in (out_basis, in_basis)]
    ranks = [None if w is None else w.shape[1] for w in weights]
    sizes = (input.shape[2:], grad.shape[2:], window, stride, padding, dilation)
    layer = cost_model.Conv(input.shape[0], grad.shape[1], input.shape[1], *ranks, *(tuple(v) for v in sizes))
    known = tuple(known) or (0, 0)
    late = cost_model.project_gradient(layer, known)
    early = [None if last else w for last, w in zip(late, weights)]
    shape = [n if w is None else w.shape[1] for w, n in zip(early, (layer.n_out, layer.n_in))]
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    gradient = input.new_empty((*shape, *window), dtype=wide)
    _C.tucker_conv_backward_cpu(
        CODES[input.dtype],
        _conv2d(input, grad.shape[1], gradient.shape, grad.shape[2:], stride, padding, dilation),
        *(dy.data_ptr(), x.data_ptr(), 0, 0, 0, *(_pointer(w) for w in early)),
        *([0, gradient.data_ptr(), 0, 0, 0], [0, 0] if any(late) else known, torch.get_num_threads()),
    )
    if any(late):
        modes = [mode for mode in (0, 1) if late[mode]]
        window_first = gradient.movedim((0, 1), (-2, -1)).contiguous()
        projected = [weights[i] for i in modes], [i - 2 for i in modes]
        window_first = tables.multi_mode_dot(run, window_first, *projected, True)
        gradient = window_first.movedim((-2, -1), (0, 1)).contiguous()
        gradient[: known[0], : known[1]] = 0
    return gradient.to(input.dtype)
