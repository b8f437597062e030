"""The `cuda` back end: prepares addresses and sizes for the launch plans in `_C`, and a workspace for each call.

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

import logging
import math

import torch

from tucker_kernels import reference
from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, MAX_MODES, native_module, widened

_C, _ = native_module()
_LARGEST = 1024  # the largest factorisation
_SWEEPS = 12  # most Jacobi sweeps of a truncation; a core in HOSVD form needs one or two and stops by itself

log = logging.getLogger("tucker_kernels")


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream


def _launch(name, like, problems):
    operator, dtype = getattr(_C, f"{name}_cuda"), CODES[like.dtype]
    with torch.cuda.device_of(like):
        size = operator(dtype, problems, 0, 0, 0)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=like.device)
        operator(dtype, problems, workspace.data_ptr(), size, _stream(like.device))


def _too_large(name, sizes):
    if max(sizes, default=0) <= _LARGEST:
        return False
    log.warning("%s: size %d is above %d; the reference does it, and waits for the device", name, max(sizes), _LARGEST)
    return True


# ---- multilinear algebra ----------------------------------------------------------------------------------


@implements("cuda")
def mode_dot(tensor, matrix, mode, transpose):
    return multi_mode_dot(tensor, [matrix], [mode], transpose)


@implements("cuda")
def multi_mode_dot(tensor, matrices, modes, transpose):
    if tensor.ndim > MAX_MODES:
        return reference.multi_mode_dot(tensor, matrices, modes, transpose)
    order = reference.dimension_order(tensor)
    x, factors = widened(tensor.permute(order)), [widened(m) for m in matrices]
    places = [order.index(mode % tensor.ndim) for mode in modes]
    (y,) = grouped_mode_dot([x], factors, [len(factors)], places, transpose)
    return y.to(tensor.dtype).permute([order.index(i) for i in range(len(order))])


@implements("cuda")
def grouped_mode_dot(tensors, matrices, counts, modes, transpose):
    if any(x.ndim > MAX_MODES for x in tensors):
        return reference.grouped_mode_dot(tensors, matrices, counts, modes, transpose)
    xs, factors = [x.contiguous() for x in tensors], [m.contiguous() for m in matrices]
    found, problems, start = [], [], 0
    for x, count in zip(xs, counts):
        here = slice(start, start + count)
        start += count
        own, places = factors[here], modes[here]
        shape = list(x.shape)
        cheapest = reference.mode_order(x.shape, [tuple(m.shape) for m in own], places, transpose)
        chain = [[], [], []]
        for k in cheapest:
            shape[places[k]] = rows = own[k].shape[1 if transpose else 0]
            for values, value in zip(chain, (places[k], rows, own[k].data_ptr())):
                values.append(value)
        found.append(x.new_empty(shape))
        if found[-1].numel():
            problems.append((x.data_ptr(), found[-1].data_ptr(), list(x.shape), *chain, transpose))
    if problems:
        _launch("multi_mode_dot", xs[0], problems)
    return found


@implements("cuda")
def cross_gram(a, b, mode):
    (out,) = grouped_cross_gram([widened(a)], [widened(b)], [mode % a.ndim])
    return out.to(a.dtype)


@implements("cuda")
def grouped_cross_gram(a, b, modes):
    xs, ys = [x.contiguous() for x in a], [y.contiguous() for y in b]
    found = [x.new_empty(x.shape[mode], y.shape[mode]) for x, y, mode in zip(xs, ys, modes)]
    problems = [
        (*_addresses(row), math.prod(row[0].shape[:mode]), math.prod(row[0].shape[mode + 1 :]), *row[2].shape)
        for *row, mode in zip(xs, ys, found, modes)
        if row[2].numel()
    ]
    if problems:
        _launch("cross_gram", xs[0], problems)
    return found


# ---- orthonormalisation and truncation --------------------------------------------------------------------


@implements("cuda")
def tangent_basis(bases, directions):
    if _too_large("tangent_basis", [d.shape[1] for d in directions]):
        return reference.tangent_basis(bases, directions)
    us, ds = [u.contiguous() for u in bases], [d.contiguous() for d in directions]
    vs = [torch.empty_like(d) for d in ds]
    counts = us[0].new_empty(len(us), dtype=torch.int64)
    problems = [
        (u.data_ptr(), d.data_ptr(), v.data_ptr(), counts.data_ptr() + 8 * i, d.shape[0], u.shape[1], d.shape[1])
        for i, (u, d, v) in enumerate(zip(us, ds, vs))
    ]
    _launch("tangent_basis", us[0], problems)
    return vs, counts


@implements("cuda")
def hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode):
    sizes = [n for core in cores for n in core.shape]
    if _too_large("hosvd_truncate", [n for n, flag in zip(sizes, modes) if flag]) or any(
        core.ndim > MAX_MODES for core in cores
    ):
        return reference.hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode)
    olds = [core.contiguous() for core in cores]
    news = [torch.empty_like(core) for core in olds]
    projections = [olds[0].new_empty((n, n) if flag else (0,)) for n, flag in zip(sizes, modes)]
    width = max(core.ndim for core in cores)
    ranks = olds[0].new_empty(len(cores), width, dtype=torch.int64)
    error = olds[0].new_empty(len(cores), dtype=torch.float64)
    problems, start = [], 0
    for i, (old, new, tau) in enumerate(zip(olds, news, tol)):
        here = slice(start, start + old.ndim)
        start += old.ndim
        addresses = [p.data_ptr() if flag else 0 for p, flag in zip(projections[here], modes[here])]
        outputs = ranks.data_ptr() + 8 * width * i, error.data_ptr() + 8 * i
        bounds = list(old.shape), list(min_ranks[here]), list(max_ranks[here])
        problems.append((old.data_ptr(), new.data_ptr(), addresses, *outputs, *bounds, width, tau, per_mode, _SWEEPS))
    _launch("hosvd_truncate", olds[0], problems)
    return news, projections, ranks, error


@implements("cuda")
def rotate_bases(bases, rotations):
    us = [u.contiguous() for u in bases]
    # Leading columns of a larger matrix are read where they are.
    ps = [p if p.stride(1) == 1 and p.stride(0) >= p.shape[1] else p.contiguous() for p in rotations]
    found = [u.new_empty(u.shape[0], p.shape[1]) for u, p in zip(us, ps)]
    rows = [max(p.stride(0), p.shape[1]) for p in ps]
    problems = [(*_addresses(row), *row[0].shape, row[1].shape[1], step) for *row, step in zip(us, ps, found, rows)]
    _launch("rotate_bases", us[0], problems)
    return found


@implements("cuda")
def gram_solve(tensors, modes, right_sides):
    if _too_large("gram_solve", [x.shape[mode] for x, mode in zip(tensors, modes)]):
        return reference.gram_solve(tensors, modes, right_sides)
    xs, sides = [x.contiguous() for x in tensors], [b.contiguous() for b in right_sides]
    found = [torch.empty_like(b) for b in sides]
    sizes = [(math.prod(x.shape[:m]), x.shape[m], math.prod(x.shape[m + 1 :])) for x, m in zip(xs, modes)]
    problems = [(*_addresses(row), *size, len(row[1])) for *row, size in zip(xs, sides, found, sizes)]
    _launch("gram_solve", xs[0], problems)
    return found


@implements("cuda")
def batched_qr(matrices):
    if _too_large("batched_qr", [min(a.shape) for a in matrices]):
        return reference.batched_qr(matrices)
    inputs = [a.contiguous() for a in matrices]
    qs = [a.new_empty(a.shape[0], min(a.shape)) for a in inputs]
    rs = [a.new_empty(min(a.shape), a.shape[1]) for a in inputs]
    _launch("batched_qr", inputs[0], [(*_addresses(row), *row[0].shape) for row in zip(inputs, qs, rs)])
    return qs, rs


@implements("cuda")
def batched_svd(matrices):
    if _too_large("batched_svd", [min(a.shape) for a in matrices]):
        return reference.batched_svd(matrices)
    inputs = [a.contiguous() for a in matrices]
    us = [a.new_empty(a.shape[0], min(a.shape)) for a in inputs]
    ss = [a.new_empty(min(a.shape)) for a in inputs]
    vs = [a.new_empty(min(a.shape), a.shape[1]) for a in inputs]
    _launch("batched_svd", inputs[0], [(*_addresses(row), *row[0].shape) for row in zip(inputs, us, ss, vs)])
    return us, ss, vs


def _addresses(tensors):
    return [t.data_ptr() for t in tensors]
