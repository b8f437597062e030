"""The `cpu` back end's linear layer: all modes in one call of `csrc/cpu/tucker_linear.cpp`, forward and backward."""

import math
from array import array

import torch

from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, MAX_MODES, native_module, widened
from tucker_kernels.tables import pad

_C, _ = native_module()


def _refuse(core):
    return f"{core.ndim} modes, and the kernel takes {MAX_MODES}" if core.ndim > MAX_MODES else ""


def _read(*tensors):
    """Contiguous, in float32 or float64; None stays None."""
    return [None if x is None else widened(x) if x.is_contiguous() else widened(x).contiguous() for x in tensors]


def _addresses(*tensors):
    return [0 if x is None else x.data_ptr() for x in tensors]


def _layer(input, core, factors, out_modes):
    """tk_linear (csrc/include/tucker_kernels.h), the number of rows, and the mode sizes."""
    ranks, rows = core.shape, math.prod(input.shape[:-1])
    sizes = [r if factor is None else factor.shape[0] for r, factor in zip(ranks, factors)]
    layer = [rows, out_modes, core.ndim, *pad(sizes), *pad(ranks), *_addresses(core), *pad(_addresses(*factors))]
    return array("q", layer), rows, sizes


def _results(found, like):
    """In the caller's dtype; for None an empty tensor, each its own."""
    return [like.new_empty(0) if x is None else x if x.dtype == like.dtype else x.to(like.dtype) for x in found]


@implements("cpu", can_run=lambda *args: _refuse(args[1]))
def tucker_linear_forward(input, core, factors, bias, out_modes, save):
    x, c, b, *us = _read(input, core, bias, *factors)
    layer, rows, sizes = _layer(x, c, us, out_modes)
    z = t = None
    if save and any(u is not None for u in us[out_modes:]):
        z = x.new_empty((rows, math.prod(c.shape[out_modes:])))
    if save and any(u is not None for u in us[:out_modes]):
        t = x.new_empty((rows, math.prod(c.shape[:out_modes])))
    y = x.new_empty((*x.shape[:-1], math.prod(sizes[:out_modes])))
    addresses = _addresses(x, b, y, z, t)
    _C.tucker_linear_forward_cpu(CODES[x.dtype], layer.buffer_info()[0], *addresses, torch.get_num_threads())
    return tuple(_results((y, z, t), input))


@implements("cpu", can_run=lambda *args: _refuse(args[4]))
def tucker_linear_backward(grad, input, z, t, core, factors, out_modes, need):
    dy, x, z, t, c, *us = _read(grad, input, z, t, core, *factors)
    layer, _, _ = _layer(x, c, us, out_modes)
    need_input, need_core, need_bias, need_t, *need_factors = need
    found = [
        torch.empty_like(x) if need_input else None,
        torch.empty_like(c) if need_core else None,
        dy.new_empty(dy.shape[-1]) if need_bias else None,
        torch.empty_like(t) if need_t and any(u is not None for u in us[:out_modes]) else None,
        *(torch.empty_like(u) if wanted and u is not None else None for u, wanted in zip(us, need_factors)),
    ]
    gradients = array("q", [*_addresses(*found[:4]), *pad(_addresses(*found[4:]))])
    _C.tucker_linear_backward_cpu(
        *(CODES[x.dtype], layer.buffer_info()[0], *_addresses(dy, x, z, t)),
        *(gradients.buffer_info()[0], torch.get_num_threads()),
    )
    d_input, d_core, d_bias, d_t, *d_factors = _results(found, input)
    return d_input, d_core, d_bias, d_t, d_factors
