"""The specification: every operator in plain torch, written to be read.

All other back ends are tested against this one in float64. Nothing here is tuned, and nothing here calls a
compiled kernel. Where an operator works in rank space (`tangent_basis`, `hosvd_truncate`, `rotate_bases`, `batched_qr`,
`batched_svd`) it computes in float64 and rounds the results to the input's dtype.
"""

import math

import torch

from tucker_kernels.dispatch import implements

# ---- multilinear algebra (Kolda & Bader, "Tensor decompositions and applications", 2009) ------------------


def unfold(tensor, mode):
    n, *others = tensor.movedim(mode, 0).shape
    return tensor.movedim(mode, 0).reshape(n, math.prod(others))


def fold(matrix, mode, shape):
    rest = [s for i, s in enumerate(shape) if i != mode]
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)


def _accumulate(tensor):
    """Half precisions are multiplied and summed in float32, as every back end does."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@implements("reference")
def mode_dot(tensor, matrix, mode, transpose):
    """Y_(mode) = M X_(mode), or Mᵀ X_(mode)."""
    m = _accumulate(matrix.T if transpose else matrix)
    product = torch.tensordot(m, _accumulate(tensor), dims=([1], [mode])).movedim(0, mode)
    return _like(product.to(tensor.dtype), tensor)


@implements("reference")
def multi_mode_dot(tensor, matrices, modes, transpose):
    """X ×_{modes[0]} M_0 ×_{modes[1]} M_1 …, cheapest product first, rounded once at the end."""
    result = _accumulate(tensor)
    for k in mode_order(tensor.shape, [(m.shape[0], m.shape[1]) for m in matrices], modes, transpose):
        result = mode_dot(result, _accumulate(matrices[k]), modes[k], transpose)
    return _like(result.to(tensor.dtype), tensor)


def mode_order(shape, matrix_shapes, modes, transpose):
    """Order in which a chain of mode products is cheapest: by shrinkage first (optimal, by adjacent exchange)."""
    sizes = [(r, c) if not transpose else (c, r) for r, c in matrix_shapes]
    # Product i before j costs less when 1/rows_i - 1/cols_i is larger: compare r_i n_j (n_i + r_j) both ways.
    return sorted(range(len(modes)), key=lambda k: 1 / max(sizes[k][1], 1) - 1 / max(sizes[k][0], 1))


@implements("reference")
def cross_gram(a, b, mode):
    """A_(mode) B_(mode)ᵀ: contraction over every index but one; the gradient of a mode product."""
    rest = [i for i in range(a.ndim) if i != mode % a.ndim]
    return torch.tensordot(_accumulate(a), _accumulate(b), dims=(rest, rest)).to(a.dtype)


@implements("reference")
def grouped_mode_dot(tensors, matrices, counts, modes, transpose):
    """`multi_mode_dot` of every tensor with the next counts[i] matrices along the next counts[i] modes."""
    found, start = [], 0
    for tensor, count in zip(tensors, counts):
        here = slice(start, start + count)
        start += count
        found.append(multi_mode_dot(tensor.contiguous(), matrices[here], modes[here], transpose))
    return found


@implements("reference")
def grouped_cross_gram(a, b, modes):
    """`cross_gram` of every pair."""
    return [cross_gram(*pair) for pair in zip(a, b, modes)]


def dimension_order(tensor):
    """Dimensions from slowest to fastest in memory; size-one dimensions stay where they are."""
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    order = sorted(range(tensor.ndim), key=lambda i: (-tensor.stride(i), i))
    return order if _dense(tensor, order) else list(range(tensor.ndim))


def _dense(tensor, order):
    expected = 1
    for i in reversed(order):
        if tensor.shape[i] != 1:
            if tensor.stride(i) != expected:
                return False
            expected *= tensor.shape[i]
    return True


def _like(result, tensor):
    """The result in the memory format of the operand (contiguous, channels-last or any other permutation)."""
    order = dimension_order(tensor)
    inverse = [order.index(i) for i in range(len(order))]
    # A clone, because `contiguous` keeps odd strides of size-one dimensions, and results do not depend on history. And
    # one more, which keeps strides: autograd forbids changing in place what a Function returns as a view.
    return result.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse).clone()


# ---- Tucker convolution, the chain: 1×1 → core window → 1×1 ----------------------------------------------


def _convolve(x, weight, bias=None, stride=1, padding=0, dilation=1):
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
    return function(x, weight, bias, stride, padding, dilation)


def transformed():
    """Whether this is inside vmap, grad or another transform of torch.func; vmap knows no memory formats."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()


def _last_of(tensor):
    """The channels-last format of its dimensions; None where there is none."""
    return None if transformed() else {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)


def channels_last(tensor):
    """Channels-last where torch has it (2-d and 3-d images); contiguous for sequences."""
    return tensor.contiguous(memory_format=_last_of(tensor) or torch.contiguous_format)


def format_of(tensor):
    """The memory format a result keeps: channels-last where the tensor is, and is not contiguous as well."""
    last = _last_of(tensor)
    if last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        return last
    return torch.contiguous_format


def output_size(size, window, stride, padding, dilation):
    """Pixels of a convolution's result in each dimension; less than 1 where the window does not fit."""
    return [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zip(size, window, stride, padding, dilation)]


def every_nth(image, stride):
    """A view of the pixels that a 1×1 window of this stride sees."""
    seen = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    return image[seen]


def _pointwise(matrix, ndim):
    return matrix.reshape(*matrix.shape, *([1] * (ndim - 2)))


@implements("reference")
def tucker_conv_forward(input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save):
    """z = U_inᵀ x, t = core ∗ z, y = U_out t + bias; returns (y, z, t).

    z and t are what the backward pass reuses, channels-last. They are empty where a factor is absent, because they
    would be the input or the output again, and where `save` is false. `path` ("chain" or "fused") is how a back end
    computes this, not what; here it changes nothing.
    """
    x = channels_last(input)
    z = x if in_factor is None else channels_last(_convolve(x, _pointwise(in_factor.T, x.ndim)))
    last = out_factor is None
    t = _convolve(z, core, bias if last else None, stride, padding, dilation)
    y = t if last else _convolve(channels_last(t), _pointwise(out_factor, x.ndim), bias)
    y = y.contiguous(memory_format=format_of(input))
    return (  # two empty ones where both are absent: results of an operator may not be the same tensor
        y,
        z if save and in_factor is not None else input.new_empty(0),
        channels_last(t) if save and not last else input.new_empty(0),
    )


def _convolution_backward(grad, input, weight, stride, padding, dilation, mask):
    window, size = weight.shape[2:], input.shape[2:]
    if input.ndim == 5 and input.device.type == "cpu" and any(1 < k >= n for k, n in zip(window, size)):
        # Of channels-last volumes no longer than the window, torch 2.13 leaves parts of the weight's gradient
        # unwritten, or writes beyond it.
        grad, input = grad.contiguous(), input.contiguous()
    zeros = [0] * (input.ndim - 2)
    grads = torch.ops.aten.convolution_backward(
        *(grad, input, weight.contiguous(), None, stride, padding, dilation), False, zeros, 1, [*mask, False]
    )
    return grads[0], grads[1]


@implements("reference")
def tucker_conv_backward(grad, input, z, t, core, out_factor, in_factor, stride, padding, dilation, need, path):
    """Gradients of input, core, U_out, U_in and bias; `need` says which, the others come back empty.

    z and t are as the forward pass returned them; those it did not save are computed again.
    dt = U_outᵀ dy, dz = coreᵀ ∗ dt, dx = U_in dz, dU_out = Σ dy tᵀ, dU_in = Σ x dzᵀ, dcore = wgrad(z, dt).
    """
    need_x, need_core, need_out, need_in, need_bias = need
    n = input.ndim
    ones, zeros = [1] * (n - 2), [0] * (n - 2)
    empty = [input.new_empty(0) for _ in range(5)]
    x, dy = channels_last(input), channels_last(grad)
    if in_factor is None:
        z = x
    elif z.ndim != n:
        z = channels_last(_convolve(x, _pointwise(in_factor.T, n)))
    d_out = d_in = dx = d_core = None
    if out_factor is None:
        dt = dy
    else:
        if t.ndim != n and need_out:
            t = channels_last(_convolve(z, core, None, stride, padding, dilation))
        elif t.ndim != n:  # only its shape matters
            t = channels_last(dy.new_empty(dy.shape[0], out_factor.shape[1], *dy.shape[2:]))
        dt, d_out = _convolution_backward(dy, t, _pointwise(out_factor, n), ones, zeros, ones, (True, need_out))
    need_z = need_in or need_x
    dz, d_core = _convolution_backward(dt, z, core, stride, padding, dilation, (need_z, need_core))
    if in_factor is None:
        dx = dz
    elif need_z:
        dx, d_in = _convolution_backward(dz, x, _pointwise(in_factor.T, n), ones, zeros, ones, (need_x, need_in))
    return (
        dx.contiguous(memory_format=format_of(input)) if need_x else empty[0],
        d_core.contiguous() if need_core else empty[1],
        d_out.reshape(out_factor.shape).contiguous() if need_out else empty[2],
        d_in.reshape(in_factor.shape[::-1]).T.contiguous() if need_in else empty[3],
        dy.sum([i for i in range(n) if i != 1]) if need_bias else empty[4],
    )


@implements("reference")
def rank_space_wgrad(input, grad, out_basis, in_basis, window, stride, padding, dilation, known=()):
    """wgrad(U_inᵀ x, U_outᵀ dy): a convolution's weight gradient seen in two channel bases, (r_out, r_in, *window).

    With the augmented bases [U|V] it is the augmented core gradient of the one-pass step, whose leading block the
    backward pass has: the leading `known` channels (output, input) of the result are zero and need not be computed.
    """
    x, dy = channels_last(input), channels_last(grad)
    if in_basis is not None:
        x = channels_last(_convolve(x, _pointwise(in_basis.T, x.ndim)))
    if out_basis is not None:
        dy = channels_last(_convolve(dy, _pointwise(out_basis.T, dy.ndim)))
    weight = x.new_empty(dy.shape[1], x.shape[1], *window)
    gradient = _convolution_backward(dy, x, weight, stride, padding, dilation, (False, True))[1].contiguous()
    if known:
        gradient[: known[0], : known[1]] = 0
    return gradient


# ---- Tucker linear layer: project mode by mode → core → expand mode by mode ---------------------------------


def _along(products, tensor, factors, transpose, skip=None):
    """The products along modes 1, 2, … with these factors; None stands for the identity, mode 0 for the rows."""
    chosen = [i for i, factor in enumerate(factors) if factor is not None and i != skip]
    return products(tensor, [factors[i] for i in chosen], [i + 1 for i in chosen], transpose) if chosen else tensor


@implements("reference")
def tucker_linear_forward(input, core, factors, bias, out_modes, save, products=multi_mode_dot):
    """z = x ×_in Vᵀ, t = C z, y = t ×_out U + bias for every row x of the input; returns (y, z, t).

    z and t, (rows, ranks of that side), are what the backward pass reuses. They are empty where that side has no
    factor, because they would be the input or the output again, and where `save` is false. Another back end may bring
    its own `products` (and `gram`, below).
    """
    outer, inner, rows = factors[:out_modes], factors[out_modes:], math.prod(input.shape[:-1])
    sizes = [r if V is None else V.shape[0] for r, V in zip(core.shape[out_modes:], inner)]
    matrix = core.reshape(math.prod(core.shape[:out_modes]), math.prod(core.shape[out_modes:]))
    z = _along(products, input.contiguous().reshape(rows, *sizes), inner, True).reshape(rows, matrix.shape[1])
    t = products(z, [matrix], [1], False)
    y = _along(products, t.reshape(rows, *core.shape[:out_modes]), outer, False)
    y = y.reshape(*input.shape[:-1], math.prod(y.shape[1:]))
    y = y if bias is None else y + bias
    empty = [input.new_empty(0) for _ in range(2)]  # two, because results of an operator may not be the same tensor
    has_factor = [save and any(factor is not None for factor in side) for side in (inner, outer)]
    return y.contiguous(), z if has_factor[0] else empty[0], t if has_factor[1] else empty[1]


@implements("reference")
def tucker_linear_backward(grad, input, z, t, core, factors, out_modes, need, products=multi_mode_dot, gram=cross_gram):
    """Gradients of input, core, bias and t, and the list of those of the factors; empty where not asked for.

    dt = dy ×_out Uᵀ and dz = Cᵀ dt;  dx = dz ×_in V,  dC = Σ dt zᵀ,  dbias = Σ dy, sums over rows;
    dU_i = dY_(i) (t ×_{j≠i} U_j)_(i)ᵀ,  dV_i = X_(i) (dz ×_{j≠i} V_j)_(i)ᵀ.
    `need`: which of input, core, bias, t and each factor are asked for; that of t is empty, as t is, without a factor.
    """
    outer, inner, rows = factors[:out_modes], factors[out_modes:], math.prod(input.shape[:-1])
    sizes = [r if factor is None else factor.shape[0] for r, factor in zip(core.shape, factors)]
    r_out, r_in = math.prod(core.shape[:out_modes]), math.prod(core.shape[out_modes:])
    x, dy = input.reshape(rows, *sizes[out_modes:]), grad.reshape(rows, *sizes[:out_modes])
    z = (x if all(V is None for V in inner) else z).reshape(rows, r_in)
    dt = _along(products, dy, outer, True).reshape(rows, r_out)
    dz = products(dt, [core.reshape(r_out, r_in)], [1], True).reshape(rows, *core.shape[out_modes:])
    need_input, need_core, need_bias, need_t, *need_factors = need
    d_factors = []
    for i, (factor, wanted) in enumerate(zip(factors, need_factors)):
        if factor is None or not wanted:
            d_factors.append(input.new_empty(0))
        elif i < out_modes:
            rest = _along(products, t.reshape(rows, *core.shape[:out_modes]), outer, False, skip=i)
            d_factors.append(gram(dy, rest, i + 1))
        else:
            i -= out_modes
            d_factors.append(gram(x, _along(products, dz, inner, False, skip=i), i + 1))
    return (
        _along(products, dz, inner, False).reshape(input.shape).contiguous() if need_input else input.new_empty(0),
        gram(dt, z, 1).reshape(core.shape) if need_core else input.new_empty(0),
        dy.reshape(rows, math.prod(sizes[:out_modes])).sum(0) if need_bias else input.new_empty(0),
        dt if need_t and any(U is not None for U in outer) else input.new_empty(0),
        d_factors,
    )


# ---- orthonormalisation and truncation --------------------------------------------------------------------


def dependence_tolerance(n, dtype):
    """Relative size below which a projected column is rounding noise: 8 √n · 2u, u the unit roundoff."""
    return 8 * math.sqrt(n) * torch.finfo(dtype).eps


@implements("reference")
def tangent_basis(bases, directions):
    """Gram–Schmidt of each D against U and itself, twice, column by column; dependent columns are dropped.

    Returns the list of V, kept columns first and then exact zeros, and how many were kept (−1 where D or U is not
    finite; that V is zero).
    """
    found, counts = [], []
    for U, D in zip(bases, directions):
        if not (torch.isfinite(U).all() and torch.isfinite(D).all()):
            found.append(torch.zeros_like(D))
            counts.append(-1)
            continue
        basis, kept = U.double(), []
        for d in D.double().unbind(1):
            norm = d.norm()
            if norm < 1e-30:
                continue
            v = d / norm
            for _ in range(2):
                v = v - basis @ (basis.T @ v)
            if v.norm() <= dependence_tolerance(U.shape[0], U.dtype):
                continue
            v = v / v.norm()
            v = v - basis @ (basis.T @ v)
            kept.append(v / v.norm())
            basis = torch.cat([basis, kept[-1][:, None]], 1)
        V = torch.zeros_like(D, memory_format=torch.contiguous_format)
        if kept:
            V[:, : len(kept)] = torch.stack(kept, 1).to(D.dtype)
        found.append(V)
        counts.append(len(kept))
    return found, torch.tensor(counts, dtype=torch.int64, device=bases[0].device)


@implements("reference")
def hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode):
    """Higher-order SVD of each core, cut to the smallest ranks that keep the error within the tolerance.

    The lists are flat: `modes`, `min_ranks` and `max_ranks` hold, core after core, one entry per dimension of the
    core; `modes` is 1 where a mode is truncated. tol[l] < 0 means: take max_ranks exactly.
    A mode's rank is the smallest k with Σ_{j>k} σ_j² ≤ τ²‖C‖²/d ("global", d truncated modes) or ≤ τ²‖C‖²
    ("per_mode"), clamped to [min_rank, max_rank]; a tail below (n ε ‖C‖)², ε that of float64, is rounding and counts
    as zero, so that τ = 0 finds the rank of a deficient core. Then, while some rank exceeds the product of the others,
    that mode is cut to the product; nothing is lost by it.

    Returns new cores and projections (both the size of their input, zero beyond the rank; the projection of a mode
    that is not truncated is empty), ranks (cores × most modes), and the relative errors ‖C − C'×P‖/‖C‖. A core that
    is not finite comes back as it is with identity projections and error NaN.
    """
    new_cores, projections, ranks, errors = [], [], [], []
    width = max(c.ndim for c in cores)
    start = 0
    for core, tau in zip(cores, tol):
        here = slice(start, start + core.ndim)
        start += core.ndim
        new, own, rank, error = _truncate_one(core, modes[here], tau, min_ranks[here], max_ranks[here], per_mode)
        new_cores.append(new)
        projections += own
        ranks.append(rank + [0] * (width - core.ndim))
        errors.append(error)
    device = cores[0].device
    return (
        new_cores,
        projections,
        torch.tensor(ranks, dtype=torch.int64, device=device),
        torch.tensor(errors, dtype=torch.float64, device=device),
    )


def _truncate_one(core, modes, tau, min_ranks, max_ranks, per_mode):
    """(new core, projections, ranks, error) of one core."""
    C, shape = core.double(), core.shape
    truncated = [i for i, flag in enumerate(modes) if flag]
    if not torch.isfinite(C).all():
        like = {"dtype": core.dtype, "device": core.device}
        eyes = [torch.eye(n, **like) if i in truncated else core.new_empty(0) for i, n in enumerate(shape)]
        return core.clone(memory_format=torch.contiguous_format), eyes, list(shape), float("nan")
    bound = tau**2 * C.norm() ** 2 / (1 if per_mode else max(len(truncated), 1))
    P, rank = {}, list(shape)
    for i in truncated:
        matrix = unfold(C, i)  # all left vectors are wanted, but not the right ones beyond the rank
        left, sigma, _ = torch.linalg.svd(matrix, full_matrices=matrix.shape[0] > matrix.shape[1])
        energy = torch.zeros(shape[i], dtype=C.dtype, device=C.device)
        energy[: len(sigma)] = sigma**2
        tail = energy.flip(0).cumsum(0).flip(0)  # tail[k] = Σ_{j≥k} σ_j²
        noise = shape[i] * torch.finfo(C.dtype).eps * C.norm()
        wanted = int((tail > max(bound, noise**2)).sum()) if tau >= 0 else shape[i]
        rank[i] = max(min(wanted, max_ranks[i], shape[i]), min(min_ranks[i], shape[i]))
        if not C.any():
            left = torch.eye(shape[i], dtype=C.dtype, device=C.device)
        P[i] = left[:, : rank[i]]
    small = C
    for i in truncated:
        small = mode_dot(small, P[i], i, True)
    while infeasible := [i for i in truncated if rank[i] > math.prod(rank) // max(rank[i], 1)]:
        i = infeasible[0]
        rank[i] = math.prod(rank) // rank[i]
        rotation = torch.linalg.svd(unfold(small, i), full_matrices=False)[0][:, : rank[i]]
        P[i] = P[i] @ rotation
        small = mode_dot(small, rotation, i, True)
    back = small
    for i in truncated:
        back = mode_dot(back, P[i], i, False)
    error = float((C - back).norm() / C.norm()) if C.any() else 0.0
    new = torch.zeros(shape, dtype=core.dtype, device=core.device)
    new[tuple(slice(0, r) for r in rank)] = small.to(core.dtype)
    padded = []
    for i, n in enumerate(shape):
        square = core.new_zeros(n, n) if i in truncated else core.new_empty(0)
        if i in truncated:
            square[:, : rank[i]] = P[i].to(core.dtype)
        padded.append(square)
    return new, padded, rank, error


@implements("reference")
def rotate_bases(bases, rotations):
    """Q = B P, then one Newton step towards the nearest orthonormal matrix, Q (3I − QᵀQ) / 2 (Björck & Bowie 1971)."""
    rotated = []
    for B, P in zip(bases, rotations):
        Q = B.double() @ P.double()
        rotated.append((1.5 * Q - 0.5 * Q @ (Q.T @ Q)).to(B.dtype))
    return rotated


@implements("reference")
def gram_solve(tensors, modes, right_sides):
    """X = B (M Mᵀ + ρ I)⁻¹, M = Mat_mode(C), ρ = 4ε tr(M Mᵀ) with ε that of the dtype; 0 for C = 0."""
    solutions = []
    for C, mode, B in zip(tensors, modes, right_sides):
        M = unfold(C.double(), mode)
        gram = M @ M.T
        trace = gram.trace()
        gram.diagonal().add_(4 * torch.finfo(C.dtype).eps * trace)
        X = torch.cholesky_solve(B.double().T, torch.linalg.cholesky_ex(gram).L).T
        solutions.append(torch.where(trace == 0, 0.0, X).contiguous().to(C.dtype))
    return solutions


@implements("reference")
def batched_qr(matrices):
    """Reduced QR of each matrix with a non-negative diagonal of R."""
    qs, rs = [], []
    for A in matrices:
        Q, R = torch.linalg.qr(A.double())
        sign = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(R.dtype)
        qs.append((Q * sign).to(A.dtype).contiguous())
        rs.append((R * sign[:, None]).to(A.dtype).contiguous())
    return qs, rs


@implements("reference")
def batched_svd(matrices):
    """Thin SVD A = U diag(s) Vh of each matrix, s descending."""
    us, ss, vs = [], [], []
    for A in matrices:
        U, s, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        us.append(U.to(A.dtype).contiguous())
        ss.append(s.to(A.dtype).contiguous())
        vs.append(Vh.to(A.dtype).contiguous())
    return us, ss, vs
