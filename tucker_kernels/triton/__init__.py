"""The `triton` back end: kernels for the large, data-sized operators. Triton is imported at the first call, not here.

Each operator is registered with a predicate that says why a call cannot run here; `dispatch.py` logs the reason and
asks the next back end. The kernels themselves are functions of the modules of the same names:

    tucker_core_expand    core convolution and 1×1 expansion in one kernel, forward and data gradient
    project_accumulate    A B and Aᵀ T in one read of A
    rank_space_wgrad      the (augmented) core gradient between rank-space images
    tucker_linear         the two-mode linear layer in one kernel, and its backward pass
"""

import torch

from tucker_kernels.dispatch import implements
from tucker_kernels.triton.configs import MAX_RANK

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_PIXELS = 2**31


def _refuse_images(*images):
    """Why these images cannot be read by the kernels, or nothing."""
    for image in images:
        if image.ndim != 4:
            return f"{image.ndim - 2} window dimensions, and these kernels have 2"
        if image.dtype not in DTYPES:
            return f"{image.dtype}, and these kernels have bfloat16, float16 and float32"
        if image.shape[0] * image.shape[2] * image.shape[3] >= MAX_PIXELS:
            return f"{image.shape[0] * image.shape[2] * image.shape[3]} pixels, and pixel indices have 31 bits"
    return ""


def _refuse_conv(images, core, out_factor, in_factor, path):
    if path != "fused":
        return f"path {path!r}, which is left to the library's convolutions"
    if out_factor is None or in_factor is None:
        return "a channel mode without a factor, so there is no pair to fuse"
    if max(core.shape[:2]) > MAX_RANK:
        return f"ranks {tuple(core.shape[:2])}, and {MAX_RANK} is the most that a program holds"
    return _refuse_images(*images)


def _forward_can_run(input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save):
    return _refuse_conv((input,), core, out_factor, in_factor, path)


def _backward_can_run(grad, input, z, t, core, out_factor, in_factor, stride, padding, dilation, need, path):
    return _refuse_conv((grad, input), core, out_factor, in_factor, path)


def _wgrad_can_run(input, grad, out_basis, in_basis, window, stride, padding, dilation, known=()):
    return _refuse_images(input, grad)


def _at_first_call(operator):
    """The operator's implementation, whose module imports triton."""

    def run(*args):
        from tucker_kernels.triton import operators

        return getattr(operators, operator)(*args)

    return run


for _operator, _can_run in (
    ("tucker_conv_forward", _forward_can_run),
    ("tucker_conv_backward", _backward_can_run),
    ("rank_space_wgrad", _wgrad_can_run),
):
    implements("triton", _operator, _can_run)(_at_first_call(_operator))
