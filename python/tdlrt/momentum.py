"""The part of a heavy-ball momentum that the bases cannot hold.

The core's buffer holds the momentum in the bases; in a step they grow to [U|V] and shrink to U' = [U|V]P, and what is
outside U' would be lost: directions outside the bases would start from rest in every step, and at μ = 0.9 bases turn at
a tenth of the core's rate. So every factor keeps the momentum of its gradient,

    m ← μ m + ∇_U L,   then   m ← (I − U'U'ᵀ) m P₁,   P₁ = UᵀU',        (n × r)

V spans (I − UUᵀ) m after the first of these, and the core's buffer receives, where mode i alone is new,

    V_iᵀ m_i (Mat_i(C) Mat_i(C)ᵀ)⁻¹ Mat_i(C),

which is V_iᵀ K_i projected on the rows of Mat_i(C), because ∇_{U_i} L = K_i Mat_i(C)ᵀ, K_i = Mat_i(∇_W L ×_{j≠i} U_jᵀ).
Together that is the momentum's projection on the tangent space, to first order in the step.

Only for SGD: Adam divides by a second moment, which directions that just came in do not have.
"""

import torch

from tucker_kernels.library import call, ops

BUFFER = "momentum_buffer"
OUTSIDE = "momentum_outside"  # in a core's state: m or None, per mode


def advance(m, gradient, group, clip=1.0):
    """μ m + ∇_U L with torch's conventions (dampening not in the first step, descent direction when maximising)."""
    weight = -clip if group["maximize"] else clip
    if m is None:
        return weight * gradient
    return (group["momentum"] * m).add_(gradient, alpha=weight * (1 - group["dampening"]))


def bring_in(e, buffer, outside):
    """Writes each m into the block of the augmented buffer in which its mode alone is new."""
    for mode, m in enumerate(outside):
        r = e.core.shape[mode]
        if m is not None and e.shape[mode] > r:
            block = list(e.known_block)
            block[mode] = slice(r, None)
            products = call(ops.cross_gram.default, m, e.bases[mode][:, r:], 1)
            inverse_times = torch.cholesky_solve(products, _cholesky_of_gram(e.core, mode))
            buffer[tuple(block)] = call(ops.mode_dot.default, e.core, inverse_times, mode, True)


def _cholesky_of_gram(core, mode):
    """Of Mat(C) Mat(C)ᵀ, raised by its rounding: deficient cores stay solvable, and the projector never amplifies."""
    gram = call(ops.cross_gram.default, core, core, mode)
    diagonal = gram.diagonal()
    numbers = torch.finfo(core.dtype)
    diagonal += 4 * numbers.eps * diagonal.sum() + numbers.tiny
    return torch.linalg.cholesky_ex(gram).L


def carry(m, projection, basis):
    """m at the truncated basis U': its columns rotated by P₁, and what U' now holds taken out."""
    m = call(ops.mode_dot.default, m, projection[: m.shape[1]], 1, True)
    inside = call(ops.cross_gram.default, basis, m, 1)
    return m.sub_(call(ops.mode_dot.default, basis, inside, 1, True))


def decay(state, group):
    """A step that moves the core alone: no gradient comes in outside the bases."""
    if OUTSIDE in state:
        state[OUTSIDE] = [None if m is None else group["momentum"] * m for m in state[OUTSIDE]]
