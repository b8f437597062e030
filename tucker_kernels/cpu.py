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
    mode = mode % tensor.ndim
    order = reference.dimension_order(tensor)
    inverse = [order.index(i) for i in range(len(order))]
    x = _wide(tensor).permute(order).contiguous()  # copies only what is not dense
    m = _wide(matrix).contiguous()
    place = inverse[mode]
    rows = m.shape[1] if transpose else m.shape[0]
    y = x.new_empty(*x.shape[:place], rows, *x.shape[place + 1 :])
    outer, inner = math.prod(x.shape[:place]), math.prod(x.shape[place + 1 :])
    _C.mode_dot_cpu(
        *(_CODES[x.dtype], x.data_ptr(), outer, x.shape[place], inner),
        *(m.data_ptr(), rows, transpose, y.data_ptr(), torch.get_num_threads()),
    )
    return y.to(tensor.dtype).permute(inverse)
