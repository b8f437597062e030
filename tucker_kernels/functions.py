"""The operators as `torch.autograd.Function`s: the differentiable contract, to any order.

Each `backward` is made of operators that are themselves differentiable, or, where a fused backward kernel is used,
goes through the reference when a second derivative is asked for.
"""

import torch
from torch.autograd import Function

from tucker_kernels import reference
from tucker_kernels.library import call, differentiable, ops


class ModeDot(Function):
    """Y = X ×_mode M (or Mᵀ).   dX = dY ×_mode Mᵀ,   dM = dY_(mode) X_(mode)ᵀ."""

    @staticmethod
    def forward(ctx, tensor, matrix, mode, transpose):
        ctx.save_for_backward(tensor, matrix)
        ctx.mode, ctx.transpose = mode, transpose
        return call(ops.mode_dot.default, tensor, matrix, mode, transpose)

    @staticmethod
    def backward(ctx, grad):
        tensor, matrix = ctx.saved_tensors
        d_tensor = d_matrix = None
        if ctx.needs_input_grad[0]:
            d_tensor = ModeDot.apply(grad, matrix, ctx.mode, not ctx.transpose)
        if ctx.needs_input_grad[1]:
            pair = (tensor, grad) if ctx.transpose else (grad, tensor)
            d_matrix = CrossGram.apply(*pair, ctx.mode)
        return d_tensor, d_matrix, None, None


class CrossGram(Function):
    """G = A_(mode) B_(mode)ᵀ.   dA = B ×_mode dG,   dB = A ×_mode dGᵀ."""

    @staticmethod
    def forward(ctx, a, b, mode):
        ctx.save_for_backward(a, b)
        ctx.mode = mode
        return call(ops.cross_gram.default, a, b, mode)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        d_a = ModeDot.apply(b, grad, ctx.mode, False) if ctx.needs_input_grad[0] else None
        d_b = ModeDot.apply(a, grad, ctx.mode, True) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None


class MultiModeDot(Function):
    """Y = X ×_{m₁} M₁ ×_{m₂} M₂ …   dX = dY ×_i Mᵢᵀ,   dMᵢ = dY_(i) (X ×_{j≠i} Mⱼ)_(i)ᵀ."""

    @staticmethod
    def forward(ctx, *args):  # torch._dynamo drops ctx where the arguments are as many as the parameters named here
        tensor, modes, transpose, *matrices = args
        ctx.save_for_backward(tensor, *matrices)
        ctx.modes, ctx.transpose = modes, transpose
        return call(ops.multi_mode_dot.default, tensor, matrices, modes, transpose)

    @staticmethod
    def backward(ctx, grad):
        tensor, *matrices = ctx.saved_tensors
        modes, transpose = ctx.modes, ctx.transpose
        d_tensor = None
        if ctx.needs_input_grad[0]:
            d_tensor = MultiModeDot.apply(grad, modes, not transpose, *matrices)
        d_matrices = [None] * len(matrices)
        for i, mode in enumerate(modes):
            if ctx.needs_input_grad[3 + i]:
                others = [m for j, m in enumerate(matrices) if j != i]
                rest = modes[:i] + modes[i + 1 :]
                partial = MultiModeDot.apply(tensor, rest, transpose, *others) if others else tensor
                pair = (partial, grad) if transpose else (grad, partial)
                d_matrices[i] = CrossGram.apply(*pair, mode)
        return d_tensor, None, None, *d_matrices


class TuckerConv(Function):
    """The chain y = U_out (core ∗ (U_inᵀ x)) + b with its fused backward; formulas in `reference.py`.

    `path` is "chain" or "fused". With `save` the rank-space images z and t are kept for the backward pass, without it
    they are computed again there. A second derivative recomputes the chain in plain torch and differentiates that.
    """

    @staticmethod
    def forward(ctx, input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save):
        operands = (input, core, out_factor, in_factor, bias)
        y, z, t = call(ops.tucker_conv_forward.default, *operands, stride, padding, dilation, path, save)
        ctx.save_for_backward(*operands, z, t)
        ctx.geometry, ctx.path = (stride, padding, dilation), path
        return y

    @staticmethod
    def backward(ctx, grad):
        input, core, out_factor, in_factor, bias, z, t = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:5])
        if torch.is_grad_enabled():
            # Views of their own: where one operand was computed from another, each gradient is for its place alone.
            operands = [None if x is None else x.view_as(x) for x in (input, core, out_factor, in_factor, bias)]
            y = reference.tucker_conv_forward(*operands, *ctx.geometry, "chain", False)[0]
            wanted = [x for x, n in zip(operands, need) if n]
            grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return *(next(grads) if n else None for n in need), None, None, None, None, None
        saved = (input, z, t, core, out_factor, in_factor)
        grads = call(ops.tucker_conv_backward.default, grad, *saved, *ctx.geometry, need, ctx.path)
        return *(g if n else None for g, n in zip(grads, need)), None, None, None, None, None


class EveryNth(Function):
    """The pixels that a 1×1 window of the given stride sees, dense and in the input's memory format."""

    @staticmethod
    def forward(ctx, input, stride):
        ctx.shape, ctx.format, ctx.stride = input.shape, reference.format_of(input), stride
        return reference.every_nth(input, stride).contiguous(memory_format=ctx.format)

    @staticmethod
    def backward(ctx, grad):
        full = grad.new_zeros(ctx.shape).contiguous(memory_format=ctx.format)
        reference.every_nth(full, ctx.stride).copy_(grad)
        return full, None


class BatchedQR(Function):
    """Reduced QR of a list; differentiable for matrices of full column rank with at least as many rows as columns.

    dA = (dQ + Q copyltu(R dRᵀ − dQᵀ Q)) R⁻ᵀ, where copyltu(M) mirrors the lower triangle (Walter & Lehmann, 2012).
    """

    @staticmethod
    def forward(ctx, *matrices):
        qs, rs = call(ops.batched_qr.default, matrices)
        ctx.save_for_backward(*qs, *rs)
        return *qs, *rs

    @staticmethod
    def backward(ctx, *grads):
        count = len(grads) // 2
        out = []
        for i in range(count):
            Q, R = ctx.saved_tensors[i], ctx.saved_tensors[count + i]
            if R.shape[0] != R.shape[1]:
                raise RuntimeError(
                    f"batched_qr: matrix {i} has more columns ({R.shape[1]}) than rows ({R.shape[0]}); its "
                    "QR is not differentiable here"
                )
            dQ, dR = grads[i], grads[count + i]
            M = R @ dR.T - dQ.T @ Q
            M = M.tril() + M.tril(-1).T
            out.append(torch.linalg.solve_triangular(R, (dQ + Q @ M).T, upper=True).T)
        return tuple(out)


class BatchedSVD(Function):
    """Thin SVD of a list; differentiable where the singular values of each matrix are distinct and non-zero.

    The gradient is torch's own for the gauge-invariant part: functions of U and V must not depend on the signs of
    the singular vectors.
    """

    @staticmethod
    def forward(ctx, *matrices):
        us, ss, vs = call(ops.batched_svd.default, matrices)
        ctx.save_for_backward(*us, *ss, *vs)
        return *us, *ss, *vs

    @staticmethod
    def backward(ctx, *grads):
        count = len(grads) // 3
        saved = ctx.saved_tensors
        return tuple(
            _svd_backward(
                *(saved[i], saved[count + i], saved[2 * count + i]),
                *(grads[i], grads[count + i], grads[2 * count + i]),
            )
            for i in range(count)
        )


def _svd_backward(U, s, Vh, dU, ds, dVh):
    """dA = U [(J − Jᵀ)∘F diag(s) + diag(s) (K − Kᵀ)∘F + diag(ds)] Vh + the parts of dU, dV outside the spans,
    J = Uᵀ dU, K = Vh dVhᵀ, F_ij = 1/(s_j² − s_i²)  (Townsend, "Differentiating the SVD", 2016)."""
    V, dV = Vh.T, dVh.T
    gap = s[None, :] ** 2 - s[:, None] ** 2
    gap.diagonal().fill_(torch.inf)
    J, K = U.T @ dU, V.T @ dV
    inner = ((J - J.T) / gap) * s[None, :] + s[:, None] * ((K - K.T) / gap) + torch.diag(ds)
    dA = U @ inner @ Vh
    dA = dA + (dU - U @ J) / s @ Vh
    return dA + U @ ((dV - V @ K) / s).T


differentiable("mode_dot", ModeDot.apply)
differentiable("cross_gram", CrossGram.apply)
differentiable(
    "multi_mode_dot",
    lambda tensor, matrices, modes, transpose: MultiModeDot.apply(tensor, modes, transpose, *matrices),
)
differentiable("batched_qr", lambda matrices: _columns(BatchedQR.apply(*matrices), 2))
differentiable("batched_svd", lambda matrices: _columns(BatchedSVD.apply(*matrices), 3))


def _columns(flat, count):
    """What a Function returned flat, as the `count` lists its operator returns."""
    size = len(flat) // count
    return tuple(list(flat[i * size : (i + 1) * size]) for i in range(count))
