"""The `cpu` back end: prepares pointers and sizes for the compiled kernels in `_C`.

Called from `library.py` with checked arguments. Tensors whose layout the kernels do not read directly are made
contiguous here; half precisions are widened to float32 and rounded once at the end.
"""

import math

import torch

from tucker_kernels import reference
from tucker_kernels.backends import implements, native_module

_C, _ = native_module()
_CODES = {torch.float32: 0, torch.float64: 1}


def _wide(tensor):
    return tensor if tensor.dtype in _CODES else tensor.float()


@implements("cpu")
def mode_dot(tensor, matrix, mode, transpose):
    order = reference.dimension_order(tensor)
    plain = tensor.is_contiguous()
    x = _wide(tensor if plain else tensor.permute(order).contiguous())  # copies only what is not dense
    m = _wide(matrix).contiguous()
    place = order.index(mode % tensor.ndim)
    shape = list(x.shape)
    outer, n, inner = math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :])
    rows = shape[place] = m.shape[1 if transpose else 0]
    y = x.new_empty(shape)
    _C.mode_dot_cpu(
        *(_CODES[x.dtype], x.data_ptr(), outer, n, inner),
        *(m.data_ptr(), rows, transpose, y.data_ptr(), torch.get_num_threads()),
    )
    if x.dtype != tensor.dtype:
        y = y.to(tensor.dtype)
    return y if plain else y.permute([order.index(i) for i in range(len(order))])
