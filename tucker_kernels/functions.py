"""The operators as `torch.autograd.Function`s: the differentiable contract, to any order.

Each `backward` is made of operators that are themselves differentiable, or, where a fused backward kernel is used,
goes through the reference when a second derivative is asked for. `forward` and `setup_context` are apart, and vmap
rules are generated, so that the transforms of `torch.func` take them.
"""

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from tucker_kernels import reference
from tucker_kernels.library import call, differentiable, ops


class Operator(Function):
    """A Function that the transforms of `torch.func` take, and that costs nothing more without them."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args):
        if reference.transformed():
            return super().apply(*args)
        # Past `Function.apply`, which binds the arguments to the signature of `forward`: as much as a small product.
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))


def _within(function, *args):
    """`function.apply` for a backward pass; where that keeps no graph, the operator alone."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(*args)


class ModeDot(Operator):
    """Y = X ×_mode M (or Mᵀ).   dX = dY ×_mode Mᵀ,   dM = dY_(mode) X_(mode)ᵀ."""

    @staticmethod
    def forward(tensor, matrix, mode, transpose):
        return call(ops.mode_dot.default, tensor, matrix, mode, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensor, matrix, ctx.mode, ctx.transpose = inputs
        ctx.save_for_backward(tensor, matrix)

    @staticmethod
    def backward(ctx, grad):
        tensor, matrix = ctx.saved_tensors
        d_tensor = d_matrix = None
        if ctx.needs_input_grad[0]:
            d_tensor = _within(ModeDot, grad, matrix, ctx.mode, not ctx.transpose)
        if ctx.needs_input_grad[1]:
            pair = (tensor, grad) if ctx.transpose else (grad, tensor)
            d_matrix = _within(CrossGram, *pair, ctx.mode)
        return d_tensor, d_matrix, None, None


class CrossGram(Operator):
    """G = A_(mode) B_(mode)ᵀ.   dA = B ×_mode dG,   dB = A ×_mode dGᵀ."""

    @staticmethod
    def forward(a, b, mode):
        return call(ops.cross_gram.default, a, b, mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, ctx.mode = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        d_a = _within(ModeDot, b, grad, ctx.mode, False) if ctx.needs_input_grad[0] else None
        d_b = _within(ModeDot, a, grad, ctx.mode, True) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None


class MultiModeDot(Operator):
    """Y = X ×_{m₁} M₁ ×_{m₂} M₂ …   dX = dY ×_i Mᵢᵀ,   dMᵢ = dY_(i) (X ×_{j≠i} Mⱼ)_(i)ᵀ."""

    @staticmethod
    def forward(tensor, modes, transpose, *matrices):
        return call(ops.multi_mode_dot.default, tensor, matrices, modes, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensor, ctx.modes, ctx.transpose, *matrices = inputs
        ctx.save_for_backward(tensor, *matrices)

    @staticmethod
    def backward(ctx, grad):
        tensor, *matrices = ctx.saved_tensors
        modes, transpose = ctx.modes, ctx.transpose
        d_tensor = None
        if ctx.needs_input_grad[0]:
            d_tensor = _within(MultiModeDot, grad, modes, not transpose, *matrices)
        d_matrices = [None] * len(matrices)
        for i, mode in enumerate(modes):
            if ctx.needs_input_grad[3 + i]:
                others = [m for j, m in enumerate(matrices) if j != i]
                rest = modes[:i] + modes[i + 1 :]
                partial = _within(MultiModeDot, tensor, rest, transpose, *others) if others else tensor
                pair = (partial, grad) if transpose else (grad, partial)
                d_matrices[i] = _within(CrossGram, *pair, mode)
        return d_tensor, None, None, *d_matrices


class TuckerConv(Operator):
    """The chain y = U_out (core ∗ (U_inᵀ x)) + b with its fused backward; formulas in `reference.py`.

    `path` is "chain" or "fused". With `save` the rank-space images z and t are kept for the backward pass, without it
    they are computed again there. Returns y, z and t; the last two have no gradient.
    """

    @staticmethod
    def forward(input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save):
        operands = (input, core, out_factor, in_factor, bias)
        return call(ops.tucker_conv_forward.default, *operands, stride, padding, dilation, path, save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, stride, padding, dilation, ctx.path, _ = inputs
        _, z, t = output
        ctx.save_for_backward(*operands, z, t)
        ctx.mark_non_differentiable(z, t)
        ctx.set_materialize_grads(False)  # z and t would get zeros of their size
        ctx.geometry = (stride, padding, dilation)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        input, core, out_factor, in_factor, _, z, t = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:5])
        arguments = (grad, input, z, t, core, out_factor, in_factor, *ctx.geometry, need, ctx.path)
        grads = _within(TuckerConvBackward, *arguments)
        return *(g if n else None for g, n in zip(grads, need)), None, None, None, None, None


def _recomputed(function, operands, wanted, grads):
    """Vector-Jacobian products with `grads` of function(*operands), run again; None for operands not wanted."""
    places = [i for i, needed in enumerate(wanted) if needed]

    def of_wanted(*given):
        values = list(operands)
        for i, value in zip(places, given):
            values[i] = value
        return function(*values)

    found = dict(zip(places, torch.func.vjp(of_wanted, *(operands[i] for i in places))[1](grads)))
    return [found.get(i) for i in range(len(operands))]


class TuckerConvBackward(Operator):
    """The fused backward of `TuckerConv`. Its own derivative recomputes it in plain torch and differentiates that."""

    @staticmethod
    def forward(grad, input, z, t, core, out_factor, in_factor, stride, padding, dilation, need, path):
        saved = (input, z, t, core, out_factor, in_factor)
        return call(ops.tucker_conv_backward.default, grad, *saved, stride, padding, dilation, need, path)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, input, _, _, core, out_factor, in_factor, *ctx.how = inputs
        ctx.save_for_backward(grad, input, core, out_factor, in_factor)

    @staticmethod
    def backward(ctx, *grads):
        def gradients(grad, input, *weights):
            none = input.new_empty(0)
            return tuple(reference.tucker_conv_backward(grad, input, none, none, *weights, *ctx.how))

        wanted = [ctx.needs_input_grad[place] for place in (0, 1, 4, 5, 6)]
        d_grad, d_input, *d_weights = _recomputed(gradients, ctx.saved_tensors, wanted, grads)
        return d_grad, d_input, None, None, *d_weights, None, None, None, None, None


class TuckerLinear(Operator):
    """y = ((x ×_in Vᵀ) Cᵀ) ×_out U + b of every row, all modes in one call; formulas in `reference.py`.

    Returns y and what is kept for the backward pass, z and t, which have no gradient. Functions that were added to
    `y.grad_fn.receivers` are called in the backward pass with dy, dt and z.
    """

    @staticmethod
    def forward(input, core, bias, out_modes, *factors):
        return call(ops.tucker_linear_forward.default, input, core, factors, bias, out_modes, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, core, _, ctx.out_modes, *factors = inputs
        _, z, t = output
        ctx.save_for_backward(input, z, t, core, *factors)
        ctx.mark_non_differentiable(z, t)
        ctx.set_materialize_grads(False)  # z and t would get zeros of their size
        ctx.receivers = []

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        need_input, need_core, need_bias, _, *need_factors = ctx.needs_input_grad
        need = [need_input, need_core, need_bias, len(ctx.receivers) > 0, *need_factors]
        input, z, *others = ctx.saved_tensors
        grads = _within(TuckerLinearBackward, grad, ctx.out_modes, need, input, z, *others)
        d_input, d_core, d_bias, d_t, *d_factors = (g if n else None for g, n in zip(grads, need))
        for receive in ctx.receivers:
            receive(grad, d_t.detach(), z)
        return d_input, d_core, d_bias, None, *d_factors


class TuckerLinearBackward(Operator):
    """The backward pass of `TuckerLinear`. Its own derivative recomputes it in plain torch and differentiates that."""

    @staticmethod
    def forward(grad, out_modes, need, input, z, t, core, *factors):
        saved = (input, z, t, core, factors)
        *grads, d_factors = call(ops.tucker_linear_backward.default, grad, *saved, out_modes, need)
        return *grads, *d_factors

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, ctx.out_modes, ctx.need, input, _, _, core, *factors = inputs
        ctx.save_for_backward(grad, input, core, *factors)

    @staticmethod
    def backward(ctx, *grads):
        def gradients(grad, input, core, *factors):
            _, z, t = reference.tucker_linear_forward(input, core, factors, None, ctx.out_modes, True)
            saved = (input, z, t, core, factors)
            *found, d_factors = reference.tucker_linear_backward(grad, *saved, ctx.out_modes, ctx.need)
            return *found, *d_factors

        needs = ctx.needs_input_grad
        wanted = (needs[0], needs[3], *needs[6:])
        d_grad, d_input, *d_weights = _recomputed(gradients, ctx.saved_tensors, wanted, grads)
        return d_grad, None, None, d_input, None, None, *d_weights


class EveryNth(Operator):
    """The pixels that a 1×1 window of the given stride sees, dense and in the input's memory format."""

    @staticmethod
    def forward(input, stride):
        return reference.every_nth(input, stride).contiguous(memory_format=reference.format_of(input))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.stride = inputs
        ctx.shape, ctx.contiguous = input.shape, reference.format_of(input) is torch.contiguous_format

    @staticmethod
    def backward(ctx, grad):
        batch, channels, *size = ctx.shape
        # Zeros laid out as the input from the start: to convert them takes twenty times as long as to write them.
        full = grad.new_zeros(ctx.shape if ctx.contiguous else (batch, *size, channels))
        full = full if ctx.contiguous else full.movedim(-1, 1)
        reference.every_nth(full, ctx.stride).copy_(grad)
        return full, None


class BatchedQR(Operator):
    """Reduced QR of a list; differentiable for matrices of full column rank with at least as many rows as columns.

    dA = (dQ + Q copyltu(R dRᵀ − dQᵀ Q)) R⁻ᵀ, where copyltu(M) mirrors the lower triangle (Walter & Lehmann, 2012).
    """

    @staticmethod
    def forward(*matrices):
        qs, rs = call(ops.batched_qr.default, matrices)
        return *qs, *rs

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)

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


class BatchedSVD(Operator):
    """Thin SVD of a list; differentiable where the singular values of each matrix are distinct and non-zero.

    The gradient is torch's own for the gauge-invariant part: functions of U and V must not depend on the signs of
    the singular vectors.
    """

    @staticmethod
    def forward(*matrices):
        us, ss, vs = call(ops.batched_svd.default, matrices)
        return *us, *ss, *vs

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)

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
