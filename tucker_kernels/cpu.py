"""The `cpu` back end: prepares pointers and sizes for the compiled kernels in `_C`.

Called from `library.py` with checked arguments. Tensors whose layout the kernels do not read directly are made
contiguous here; half precisions are widened to float32 and rounded once at the end.
"""

import array
import math

import torch

from tucker_kernels import reference
from tucker_kernels.dispatch import implements
from tucker_kernels.native import CODES, MAX_MODES, native_module, widened

_C, _ = native_module()


def _layout(tensor):
    """(the tensor's elements as a contiguous float32 or float64 tensor, the order of its dimensions)."""
    if tensor.is_contiguous():
        return widened(tensor), range(tensor.ndim)
    order = reference.dimension_order(tensor)
    return widened(tensor.permute(order).contiguous()), order  # copies only what is not dense


def _restore(result, order, dtype):
    if result.dtype != dtype:
        result = result.to(dtype)
    return result if isinstance(order, range) else result.permute([order.index(i) for i in range(len(order))])


@implements("cpu")
def mode_dot(tensor, matrix, mode, transpose):
    x, order = _layout(tensor)
    m = widened(matrix)
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
        *(CODES[x.dtype], x.data_ptr(), outer, n, inner),
        *(m.data_ptr(), rows, transpose, y.data_ptr(), torch.get_num_threads()),
    )
    return _restore(y, order, tensor.dtype)


@implements("cpu")
def multi_mode_dot(tensor, matrices, modes, transpose):
    if tensor.ndim > MAX_MODES:
        result = widened(tensor)
        for k in reference.mode_order(tensor.shape, [m.shape for m in matrices], modes, transpose):
            result = mode_dot(result, widened(matrices[k]), modes[k], transpose)
        return result.to(tensor.dtype)
    x, order = _layout(tensor)
    held = [widened(m).contiguous() for m in matrices]
    y, products = _products(x, held, [order.index(m % tensor.ndim) for m in modes], transpose)
    _C.multi_mode_dot_cpu(CODES[x.dtype], [products], torch.get_num_threads())
    return _restore(y, order, tensor.dtype)


def _products(x, matrices, places, transpose):
    """(tensor for the result, the problem as `_C` takes it); everything contiguous."""
    out, rows = list(x.shape), [m.shape[1 if transpose else 0] for m in matrices]
    for place, r in zip(places, rows):
        out[place] = r
    y = x.new_empty(out)
    addresses = [m.data_ptr() for m in matrices]
    return y, (x.data_ptr(), y.data_ptr(), x.shape, places, rows, addresses, transpose)


@implements("cpu")
def grouped_mode_dot(tensors, matrices, counts, modes, transpose):
    tensors, matrices = [t.contiguous() for t in tensors], [m.contiguous() for m in matrices]
    found, problems, start = [], [], 0
    for x, count in zip(tensors, counts):
        here = slice(start, start + count)
        start += count
        y, products = _products(x, matrices[here], modes[here], transpose)
        found.append(y)
        problems.append(products)
    _C.multi_mode_dot_cpu(CODES[tensors[0].dtype], problems, torch.get_num_threads())
    return found


@implements("cpu")
def cross_gram(a, b, mode):
    x, order = _layout(a)
    y = widened(b if isinstance(order, range) else b.permute(order)).contiguous()
    (out,) = grouped_cross_gram([x], [y], [order.index(mode % a.ndim)])
    return out.to(a.dtype)


def _run(call, matrices, table, *arguments):
    """One call for all problems; `table` holds their structs, eight bytes a field (csrc/include/tucker_kernels.h)."""
    rows = array.array("q", table)
    call(CODES[matrices[0].dtype], rows.buffer_info()[0], len(matrices), *arguments, torch.get_num_threads())


@implements("cpu")
def grouped_cross_gram(a, b, modes):
    a, b = [x.contiguous() for x in a], [y.contiguous() for y in b]
    found = [x.new_empty(x.shape[mode], y.shape[mode]) for x, y, mode in zip(a, b, modes)]
    table = []
    for x, y, out, mode in zip(a, b, found, modes):
        sizes = math.prod(x.shape[:mode]), math.prod(x.shape[mode + 1 :])
        table += (x.data_ptr(), y.data_ptr(), out.data_ptr(), *sizes, *out.shape)
    _run(_C.cross_gram_cpu, a, table)
    return found


@implements("cpu")
def tangent_basis(bases, directions):
    bases = [u.contiguous() for u in bases]
    directions = [d.contiguous() for d in directions]
    found = [torch.empty_like(d) for d in directions]
    counts = torch.empty(len(bases), dtype=torch.int64)
    table = []
    for u, d, v in zip(bases, directions, found):
        table += (u.data_ptr(), d.data_ptr(), v.data_ptr(), *u.shape, d.shape[1])
    _run(_C.tangent_basis_cpu, bases, table, counts.data_ptr())
    return found, counts


@implements("cpu")
def hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode):
    width, most = max(c.ndim for c in cores), MAX_MODES
    if width > most:
        return reference.hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode)
    cores = [c.contiguous() for c in cores]
    new = [torch.empty_like(c) for c in cores]
    projections, table, start = [], [], 0
    for core, truncated in zip(cores, new):
        here, count, pad = slice(start, start + core.ndim), core.ndim, [0] * (most - core.ndim)
        start += count
        own = [core.new_empty(n, n) if f else core.new_empty(0) for n, f in zip(core.shape, modes[here])]
        projections += own
        table += (core.data_ptr(), truncated.data_ptr(), count, *core.shape, *pad, *modes[here], *pad)
        table += (*min_ranks[here], *pad, *max_ranks[here], *pad, *(p.data_ptr() for p in own), *pad)
    ranks = torch.empty(len(cores), width, dtype=torch.int64)
    errors = torch.empty(len(cores), dtype=torch.float64)
    bounds = array.array("d", tol)
    _run(
        *(_C.hosvd_truncate_cpu, cores, table, bounds.buffer_info()[0], per_mode),
        *(ranks.data_ptr(), width, errors.data_ptr()),
    )
    return new, projections, ranks, errors


@implements("cpu")
def rotate_bases(bases, rotations):
    bases = [b.contiguous() for b in bases]
    # Leading columns of a larger matrix are read where they are.
    rotations = [
        p if p.shape[1] < 2 or (p.stride(1) == 1 and p.stride(0) >= p.shape[1]) else p.contiguous() for p in rotations
    ]
    rotated = [b.new_empty(b.shape[0], p.shape[1]) for b, p in zip(bases, rotations)]
    table = []
    for b, p, u in zip(bases, rotations, rotated):
        row = max(p.stride(0), p.shape[1])
        table += (b.data_ptr(), p.data_ptr(), u.data_ptr(), *b.shape, p.shape[1], row)
    _run(_C.rotate_bases_cpu, bases, table)
    return rotated


@implements("cpu")
def gram_solve(tensors, modes, right_sides):
    tensors = [t.contiguous() for t in tensors]
    right_sides = [b.contiguous() for b in right_sides]
    solutions = [torch.empty_like(b) for b in right_sides]
    table = []
    for t, mode, b, x in zip(tensors, modes, right_sides, solutions):
        outer, inner = math.prod(t.shape[:mode]), math.prod(t.shape[mode + 1 :])
        table += (t.data_ptr(), b.data_ptr(), x.data_ptr(), outer, t.shape[mode], inner, b.shape[0])
    _run(_C.gram_solve_cpu, tensors, table)
    return solutions


@implements("cpu")
def batched_qr(matrices):
    matrices = [a.contiguous() for a in matrices]
    qs = [a.new_empty(a.shape[0], min(a.shape)) for a in matrices]
    rs = [a.new_empty(min(a.shape), a.shape[1]) for a in matrices]
    table = []
    for a, q, r in zip(matrices, qs, rs):
        table += (a.data_ptr(), q.data_ptr(), r.data_ptr(), *a.shape)
    _run(_C.batched_qr_cpu, matrices, table)
    return qs, rs


@implements("cpu")
def batched_svd(matrices):
    matrices = [a.contiguous() for a in matrices]
    us = [a.new_empty(a.shape[0], min(a.shape)) for a in matrices]
    ss = [a.new_empty(min(a.shape)) for a in matrices]
    vs = [a.new_empty(min(a.shape), a.shape[1]) for a in matrices]
    table = []
    for a, u, s, v in zip(matrices, us, ss, vs):
        table += (a.data_ptr(), u.data_ptr(), s.data_ptr(), v.data_ptr(), *a.shape)
    _run(_C.batched_svd_cpu, matrices, table)
    return us, ss, vs
