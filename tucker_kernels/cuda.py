"""The `cuda` back end: prepares addresses and sizes for the launch plans in `_C`, and a workspace for each call.

Called from `library.py` with checked arguments. One call handles all problems of a list, in a handful of launches
whose number does not depend on how many there are. Nothing here reads a value from the device: calls return at once,
ranks stay on the device as counters, and everything can be captured into a CUDA graph. Memory comes from torch's
allocator on the current stream.

Products take any size. Factorisations take matrices whose smaller side (for `tangent_basis` the number of directions,
for `hosvd_truncate` the mode) is at most 1024; a call with a larger one goes to the reference, which waits for the
device, and the log of `tucker_kernels` says so.

Limits of the method: columns that are nearly dependent (remainder within about 1e3 of rounding) while later columns
lean on them lose digits, because the inverse triangular factor is rounded to the matrix's type; in float64, what a
Gram matrix in float64 cannot see (relative size 1e-7) counts as zero. QR and SVD leave exact zeros where a vector is
not determined. Ranks chosen by tolerance are not cut further where one exceeds the product of the others.
"""

import logging
import math

import torch

from tucker_kernels import reference
from tucker_kernels.backends import implements, native_module

_C, _ = native_module()
_CODES = {torch.float32: 0, torch.float64: 1}
_MOST_MODES = 8
_LARGEST = 1024  # the largest factorisation
_SWEEPS = 12  # most Jacobi sweeps of a truncation; a core in HOSVD form needs one or two and stops by itself

log = logging.getLogger("tucker_kernels")


def _stream(device):
    return torch.cuda.current_stream(device).cuda_stream


def _launch(name, like, problems):
    operator, dtype = getattr(_C, f"{name}_cuda"), _CODES[like.dtype]
    with torch.cuda.device_of(like):
        size = operator(dtype, problems, 0, 0, 0)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=like.device)
        operator(dtype, problems, workspace.data_ptr(), size, _stream(like.device))


def _wide(tensor):
    return tensor if tensor.dtype in _CODES else tensor.float()


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
    if tensor.ndim > _MOST_MODES:
        return reference.multi_mode_dot(tensor, matrices, modes, transpose)
    order = reference.dimension_order(tensor)
    x = _wide(tensor.permute(order)).contiguous()
    factors = [_wide(m).contiguous() for m in matrices]
    rows = [m.shape[1 if transpose else 0] for m in factors]
    shape = list(x.shape)
    places = [order.index(mode % tensor.ndim) for mode in modes]
    cheapest = reference.mode_order(tensor.shape, [tuple(m.shape) for m in factors], modes, transpose)
    for k in cheapest:
        shape[places[k]] = rows[k]
    y = x.new_empty(shape)
    if y.numel():
        chain = [[values[k] for k in cheapest] for values in (places, rows, [m.data_ptr() for m in factors])]
        _launch("multi_mode_dot", x, [(x.data_ptr(), y.data_ptr(), list(x.shape), *chain, transpose)])
    return y.to(tensor.dtype).permute([order.index(i) for i in range(len(order))])


@implements("cuda")
def cross_gram(a, b, mode):
    mode = mode % a.ndim
    x, y = _wide(a).contiguous(), _wide(b).contiguous()
    out = x.new_empty(x.shape[mode], y.shape[mode])
    outer, inner = math.prod(x.shape[:mode]), math.prod(x.shape[mode + 1 :])
    if out.numel():
        _launch("cross_gram", x, [(x.data_ptr(), y.data_ptr(), out.data_ptr(), outer, inner, *out.shape)])
    return out.to(a.dtype)


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
        core.ndim > _MOST_MODES for core in cores
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


# ---- the core step: not an operator of the library, for optimisers that step many cores at once -----------


def core_step(cores, gradients, firsts=None, seconds=None, *, optimizer="sgd", lr, step=1, **options):
    """One optimiser step on zero-padded cores, all in one launch: `torch.optim`'s SGD, Adam or AdamW on padded tensors.

    Args:
        cores: list of (r_1, …, r_d), taken as zero beyond their shape.
        gradients: list of (R_1, …, R_d), R_i ≥ r_i: the gradients in augmented bases.
        firsts, seconds: states of the previous step (momentum, or Adam's two moments) in the shapes of the cores;
            `None` on the first step.
        optimizer: "sgd" (options momentum, dampening, weight_decay, nesterov), "adam" or "adamw" (betas, eps,
            weight_decay). step: 1 for the first.

    Returns: (new cores, firsts, seconds, norms): lists in the shapes of the gradients, states that the optimiser does
    not have as `None`, and ‖new core‖ as a float64 device tensor. float32 and float64.
    """
    adam = optimizer in ("adam", "adamw")
    momentum, (beta1, beta2) = options.get("momentum", 0.0), options.get("betas", (0.9, 0.999))
    old, grads = [c.contiguous() for c in cores], [g.contiguous() for g in gradients]
    states = [None if s is None else [t.contiguous() for t in s] for s in (firsts, seconds)]
    new = [torch.empty_like(g) for g in grads]
    new_firsts = [torch.empty_like(g) for g in grads] if adam or momentum else None
    new_seconds = [torch.empty_like(g) for g in grads] if adam else None
    norms = grads[0].new_empty(len(grads), dtype=torch.float64)
    numbers = [lr, momentum, options.get("dampening", 0.0), options.get("weight_decay", 0.0)]
    numbers += [beta1, beta2, options.get("eps", 1e-8)]
    choices = [int(adam), step, int(options.get("nesterov", False)), int(optimizer == "adamw")]

    def address(tensors, i):
        return 0 if tensors is None else tensors[i].data_ptr()

    problems = [
        (
            [
                *(address(tensors, i) for tensors in (old, grads, *states, new, new_firsts, new_seconds)),
                norms.data_ptr() + 8 * i,
            ],
            *(list(old[i].shape), list(grads[i].shape), choices, numbers),
        )
        for i in range(len(old))
    ]
    _launch("core_step", grads[0], problems)
    return new, new_firsts, new_seconds, norms
