"""The `cuda` back end: calls the launch plans and kernels in `_C` on device memory, with a workspace for each call.

Called from `library.py` with checked arguments. One call handles all problems of a list, in a handful of launches
whose number does not depend on how many there are. Nothing here reads a value from the device: calls return at once,
ranks stay on the device as counters, and everything can be captured into a CUDA graph. Memory comes from torch's
allocator on the current stream.

Products take any size. Factorisations take matrices whose smaller side (for `tangent_basis` the number of directions,
for `hosvd_truncate` and `gram_solve` the mode) is at most 1024; a call with a larger one goes to the reference, which
waits for the device, and the log of `tucker_kernels` says so.

Limits of the method: factors come from Gram matrices in float64. For float32 that is more than enough. In float64 what
one of them cannot see is left to a second; a remainder below about 8 n ε, relative to its column and the coefficients
with which earlier columns explain it, counts as zero. QR and SVD leave exact zeros where a vector is not determined.
"""

import array
import functools
import logging

import torch

from tucker_kernels import reference, tables
from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, native_module

_C, _ = native_module()
_LARGEST = 1024  # the largest factorisation
_FACTORISED = {  # its sizes, by operator
    "tangent_basis": lambda bases, directions: [d.shape[1] for d in directions],
    "hosvd_truncate": lambda cores, modes, *_: [
        n for n, truncated in zip((n for core in cores for n in core.shape), modes) if truncated
    ],
    "gram_solve": lambda tensors, modes, right_sides: [x.shape[mode] for x, mode in zip(tensors, modes)],
    "batched_qr": lambda matrices: [min(a.shape) for a in matrices],
    "batched_svd": lambda matrices: [min(a.shape) for a in matrices],
}

log = logging.getLogger("tucker_kernels")


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream


def _run(name, table, tensors, *arguments):
    """One call for all problems of a table (`tables.py`), on the current stream."""
    rows, size, like = array.array("q", table), array.array("q", [0]), tensors[0]
    given = (CODES[like.dtype], rows.buffer_info()[0], len(tensors), *arguments)
    call, size_at = getattr(_C, f"{name}_cuda"), size.buffer_info()[0]
    with torch.cuda.device_of(like):
        call(*given, 0, size_at, 0)
        workspace = torch.empty(max(size[0], 1), dtype=torch.uint8, device=like.device)
        call(*given, workspace.data_ptr(), size_at, _stream(like.device))


def _within_limits(name, *arguments):
    """The operator on this back end, or where a factorisation is too large for it, the reference."""
    largest = max(_FACTORISED[name](*arguments), default=0) if name in _FACTORISED else 0
    if largest <= _LARGEST:
        return tables.OPERATORS[name](_run, *arguments)
    log.warning("%s: size %d is above %d; the reference does it, and waits for the device", name, largest, _LARGEST)
    return getattr(reference, name)(*arguments)


for _name in tables.OPERATORS:
    implements("cuda", _name, tables.REFUSALS.get(_name))(functools.partial(_within_limits, _name))


@implements("cuda")
def mode_dot(tensor, matrix, mode, transpose):
    return tables.multi_mode_dot(_run, tensor, [matrix], [mode], transpose)


_products, _gram = (functools.partial(function, _run) for function in (tables.multi_mode_dot, tables.cross_gram))


@implements("cuda")
def tucker_linear_forward(*args):
    return reference.tucker_linear_forward(*args, products=_products)


@implements("cuda")
def tucker_linear_backward(*args):
    return reference.tucker_linear_backward(*args, products=_products, gram=_gram)
