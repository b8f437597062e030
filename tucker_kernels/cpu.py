"""The `cpu` back end: prepares pointers and sizes for the compiled kernels in `_C`.

Called from `library.py` with checked arguments. Tensors whose layout the kernels do not read directly are made
contiguous here; half precisions are widened to float32 and rounded once at the end.
"""

import math

import torch

from tucker_kernels import reference
from tucker_kernels.backends import implements, native_module

_C, _ = native_module()
MAX_MODES = 8  # TK_MAX_MODES in tucker_kernels.h
_CODES = {torch.float32: 0, torch.float64: 1}


def _wide(tensor):
    return tensor if tensor.dtype in _CODES else tensor.float()


def _layout(tensor):
    """(the tensor's elements as a contiguous float32 or float64 tensor, the order of its dimensions)."""
    if tensor.is_contiguous():
        return _wide(tensor), range(tensor.ndim)
    order = reference.dimension_order(tensor)
    return _wide(tensor.permute(order).contiguous()), order  # copies only what is not dense


def _restore(result, order, dtype):
    if result.dtype != dtype:
        result = result.to(dtype)
    return result if isinstance(order, range) else result.permute([order.index(i) for i in range(len(order))])


@implements("cpu")
def mode_dot(tensor, matrix, mode, transpose):
    x, order = _layout(tensor)
    m = _wide(matrix)
    if not m.is_contiguous():
        if m.mT.is_contiguous():
            m, transpose = m.mT, not transpose
        else:
            m = m.contiguous()
    place = order.index(mode % tensor.ndim)
    shape = list(x.shape)
    outer, n, inner = math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :])
    rows = shape[place] = m.shape[1 if transpose else 0]
    y = x.new_empty(shape)
    _C.mode_dot_cpu(
        *(_CODES[x.dtype], x.data_ptr(), outer, n, inner),
        *(m.data_ptr(), rows, transpose, y.data_ptr(), torch.get_num_threads()),
    )
    return _restore(y, order, tensor.dtype)


@implements("cpu")
def multi_mode_dot(tensor, matrices, modes, transpose):
    if tensor.ndim > MAX_MODES:
        result = _wide(tensor)
        for k in reference.mode_order(tensor.shape, [m.shape for m in matrices], modes, transpose):
            result = mode_dot(result, _wide(matrices[k]), modes[k], transpose)
        return result.to(tensor.dtype)
    x, order = _layout(tensor)
    held = [_wide(m).contiguous() for m in matrices]
    shape = list(x.shape)
    places = [order.index(m % tensor.ndim) for m in modes]
    rows = [m.shape[1 if transpose else 0] for m in held]
    out = list(shape)
    for place, r in zip(places, rows):
        out[place] = r
    y = x.new_empty(out)
    _C.multi_mode_dot_cpu(
        *(_CODES[x.dtype], x.data_ptr(), shape, places, rows, [m.data_ptr() for m in held]),
        *(transpose, y.data_ptr(), torch.get_num_threads()),
    )
    return _restore(y, order, tensor.dtype)


@implements("cpu")
def cross_gram(a, b, mode):
    x, order = _layout(a)
    y = _wide(b if isinstance(order, range) else b.permute(order)).contiguous()
    place = order.index(mode % a.ndim)
    p, q = x.shape[place], y.shape[place]
    outer, inner = math.prod(x.shape[:place]), math.prod(x.shape[place + 1 :])
    out = x.new_empty(p, q)
    _C.cross_gram_cpu(
        *(_CODES[x.dtype], x.data_ptr(), p, y.data_ptr(), q, outer, inner),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out.to(a.dtype)
