"""Operators over lists of problems, for both compiled back ends: they allocate results and write a table of problems.

`OPERATORS` holds them by name. Each takes first how its back end calls a compiled function, `run(name, table, tensors,
*arguments)` of `cpu.py` or `cuda.py`. The table has one row for each of `tensors`, and a row is a problem's struct in
csrc/include/tucker_kernels.h, eight bytes a field. Tensors are contiguous and float32 or float64.
"""

import array
import itertools
import math
from collections.abc import Callable

import torch

from tucker_kernels import reference
from tucker_kernels.native import MAX_MODES, widened

OPERATORS: dict[str, Callable] = {}


def refuse_truncation(cores, *_):
    """Why the compiled kernels cannot take the arguments of `hosvd_truncate`, or nothing."""
    most = max(c.ndim for c in cores)
    return f"{most} modes, and the kernel takes {MAX_MODES}" if most > MAX_MODES else ""


REFUSALS = {"hosvd_truncate": refuse_truncation}


def _operator(function):
    OPERATORS[function.__name__] = function
    return function


def _contiguous(tensors):
    return [t.contiguous() for t in tensors]


def _addresses(*tensors):
    return list(map(torch.Tensor.data_ptr, tensors))


def around(shape, mode):
    """Products of the sizes before and after a mode."""
    return math.prod(shape[:mode]), math.prod(shape[mode + 1 :])


_PADDING = [(0,) * (MAX_MODES - n) for n in range(MAX_MODES + 1)]


def pad(values):
    """A fixed array of the C structs, one entry per mode."""
    return (*values, *_PADDING[len(values)])


def layout(tensor):
    """(the tensor's elements as a contiguous float32 or float64 tensor, the order of its dimensions)."""
    if tensor.is_contiguous():
        return widened(tensor), range(tensor.ndim)
    order = reference.dimension_order(tensor)
    return widened(tensor.permute(order).contiguous()), order  # copies only what is not dense


def restore(result, order, dtype):
    """The result for a tensor that `layout` laid out, in the tensor's own layout and type."""
    if result.dtype != dtype:
        result = result.to(dtype)
    if isinstance(order, range):
        return result
    view = result.permute([order.index(i) for i in range(len(order))])
    # A tensor of its own: autograd forbids changing in place what a Function returns as a view.
    return result.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


@_operator
def multi_mode_dot(run, tensor, matrices, modes, transpose):
    x, order = layout(tensor)
    matrices = [widened(m) for m in matrices]
    places = [order.index(mode % tensor.ndim) for mode in modes]
    if x.ndim <= MAX_MODES:
        (y,) = grouped_mode_dot(run, [x], matrices, [len(matrices)], places, transpose)
        return restore(y, order, tensor.dtype)
    for k in reference.mode_order(x.shape, [m.shape for m in matrices], places, transpose):
        outer, inner = around(x.shape, places[k])
        y = x.reshape(outer, x.shape[places[k]], inner)  # one product needs no more modes than these
        (y,) = grouped_mode_dot(run, [y], [matrices[k]], [1], [1], transpose)
        x = y.reshape(*x.shape[: places[k]], y.shape[1], *x.shape[places[k] + 1 :])
    return restore(x, order, tensor.dtype)


@_operator
def cross_gram(run, a, b, mode):
    x, order = layout(a)
    y = widened(b if isinstance(order, range) else b.permute(order))
    (out,) = grouped_cross_gram(run, [x], [y], [order.index(mode % a.ndim)])
    return out.to(a.dtype)


@_operator
def grouped_mode_dot(run, tensors, matrices, counts, modes, transpose):
    tensors, matrices = _contiguous(tensors), _contiguous(matrices)
    chains = [slice(end - count, end) for end, count in zip(itertools.accumulate(counts), counts)]
    if any(x.ndim > MAX_MODES for x in tensors):
        return [multi_mode_dot(run, x, matrices[c], modes[c], transpose) for x, c in zip(tensors, chains)]
    found, table, side = [], [], int(transpose)
    for x, chain, count in zip(tensors, chains, counts):
        own, places, size = matrices[chain], modes[chain], list(x.shape)
        rows, unused = [m.shape[side] for m in own], _PADDING[count]
        for place, r in zip(places, rows):
            size[place] = r
        y = x.new_empty(size)
        found.append(y)
        table += (x.data_ptr(), y.data_ptr(), x.ndim, count, transpose, *x.shape, *_PADDING[x.ndim])
        table += (*places, *unused, *rows, *unused, *[m.data_ptr() for m in own], *unused)
    run("multi_mode_dot", table, tensors)
    return found


@_operator
def grouped_cross_gram(run, a, b, modes):
    a, b = _contiguous(a), _contiguous(b)
    found = [x.new_empty(x.shape[mode], y.shape[mode]) for x, y, mode in zip(a, b, modes)]
    table = []
    for x, y, out, mode in zip(a, b, found, modes):
        table += (*_addresses(x, y, out), *around(x.shape, mode), *out.shape)
    run("cross_gram", table, a)
    return found


@_operator
def tangent_basis(run, bases, directions):
    bases, directions = _contiguous(bases), _contiguous(directions)
    found = [torch.empty_like(d) for d in directions]
    counts = bases[0].new_empty(len(bases), dtype=torch.int64)
    table = []
    for u, d, v in zip(bases, directions, found):
        table += (*_addresses(u, d, v), *u.shape, d.shape[1])
    run("tangent_basis", table, bases, counts.data_ptr())
    return found, counts


@_operator
def hosvd_truncate(run, cores, modes, tol, min_ranks, max_ranks, per_mode):
    cores = _contiguous(cores)
    new = [torch.empty_like(c) for c in cores]
    projections, table, start = [], [], 0
    for core, truncated in zip(cores, new):
        here = slice(start, start + core.ndim)
        start += core.ndim
        own = [core.new_empty((n, n) if flag else (0,)) for n, flag in zip(core.shape, modes[here])]
        projections += own
        table += (*_addresses(core, truncated), core.ndim, *pad(core.shape), *pad(modes[here]))
        table += (*pad(min_ranks[here]), *pad(max_ranks[here]), *pad(_addresses(*own)))
    width = max(c.ndim for c in cores)
    ranks = cores[0].new_empty(len(cores), width, dtype=torch.int64)
    errors = cores[0].new_empty(len(cores), dtype=torch.float64)
    bounds = array.array("d", tol)
    outputs = ranks.data_ptr(), width, errors.data_ptr()
    run("hosvd_truncate", table, cores, bounds.buffer_info()[0], per_mode, *outputs)
    return new, projections, ranks, errors


@_operator
def rotate_bases(run, bases, rotations):
    bases = _contiguous(bases)
    # Leading columns of a larger matrix are read where they are.
    rotations = [
        p if p.stride(0) >= p.shape[1] and (p.stride(1) == 1 or p.shape[1] == 1) else p.contiguous() for p in rotations
    ]
    rotated = [u.new_empty(u.shape[0], p.shape[1]) for u, p in zip(bases, rotations)]
    table = []
    for u, p, out in zip(bases, rotations, rotated):
        table += (*_addresses(u, p, out), *u.shape, p.shape[1], max(p.stride(0), p.shape[1]))
    run("rotate_bases", table, bases)
    return rotated


@_operator
def gram_solve(run, tensors, modes, right_sides):
    tensors, right_sides = _contiguous(tensors), _contiguous(right_sides)
    solutions = [torch.empty_like(b) for b in right_sides]
    table = []
    for t, mode, b, x in zip(tensors, modes, right_sides, solutions):
        outer, inner = around(t.shape, mode)
        table += (*_addresses(t, b, x), outer, t.shape[mode], inner, b.shape[0])
    run("gram_solve", table, tensors)
    return solutions


@_operator
def batched_qr(run, matrices):
    matrices = _contiguous(matrices)
    qs = [a.new_empty(a.shape[0], min(a.shape)) for a in matrices]
    rs = [a.new_empty(min(a.shape), a.shape[1]) for a in matrices]
    table = []
    for a, q, r in zip(matrices, qs, rs):
        table += (*_addresses(a, q, r), *a.shape)
    run("batched_qr", table, matrices)
    return qs, rs


@_operator
def batched_svd(run, matrices):
    matrices = _contiguous(matrices)
    us = [a.new_empty(a.shape[0], min(a.shape)) for a in matrices]
    ss = [a.new_empty(min(a.shape)) for a in matrices]
    vs = [a.new_empty(min(a.shape), a.shape[1]) for a in matrices]
    table = []
    for a, u, s, v in zip(matrices, us, ss, vs):
        table += (*_addresses(a, u, s, v), *a.shape)
    run("batched_svd", table, matrices)
    return us, ss, vs
