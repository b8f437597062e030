"""The `cpu` back end: calls the compiled kernels in `_C` on host memory.

Called from `library.py` with checked arguments. Tensors whose layout the kernels do not read directly are made
contiguous here; half precisions are widened to float32 and rounded once at the end.
"""

import array
import functools

import torch

from tucker_kernels import tables
from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, native_module, widened

_C, _ = native_module()


def run(name, table, tensors, *arguments):
    """One call for all problems of a table (`tables.py`)."""
    rows = array.array("q", table)
    call = getattr(_C, f"{name}_cpu")
    call(CODES[tensors[0].dtype], rows.buffer_info()[0], len(tensors), *arguments, torch.get_num_threads())


for _name, _operator in tables.OPERATORS.items():
    implements("cpu", _name, tables.REFUSALS.get(_name))(functools.partial(_operator, run))


@implements("cpu")
def mode_dot(tensor, matrix, mode, transpose):
    x, order = tables.layout(tensor)
    m = widened(matrix)
    if not m.is_contiguous():
        if m.mT.is_contiguous():
            m, transpose = m.mT, not transpose
        else:
            m = m.contiguous()
    place = order.index(mode % tensor.ndim)
    shape = list(x.shape)
    outer, inner = tables.around(shape, place)
    n = shape[place]
    rows = shape[place] = m.shape[1 if transpose else 0]
    y = x.new_empty(shape)
    _C.mode_dot_cpu(
        *(CODES[x.dtype], x.data_ptr(), outer, n, inner),
        *(m.data_ptr(), rows, transpose, y.data_ptr(), torch.get_num_threads()),
    )
    return tables.restore(y, order, tensor.dtype)
