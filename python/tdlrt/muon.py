"""Muon for cores, and AdamW for everything else.

The step of a core goes along the orthogonal polar factor of its momentum, seen as a matrix of outputs by inputs: every
singular value becomes 1,

    m ← β₁ m + (1 − β₁) ∇_C L,     U Σ Vᵀ = Mat(β₁ m + (1 − β₁) ∇_C L),     C ← C − 0.2 √max(N, M) · lr · U Vᵀ

with N and M the outputs and inputs of the dense weight, a convolution's window among the inputs (Jordan et al. 2024;
the factor, by which learning rate and weight decay are those of AdamW, is of Liu et al., arXiv:2502.16982). Because the
bases are orthonormal, that is the polar factor of the weight's momentum projected on them, however the weight is
factorised. A direction that has just come in moves as far as all others, so it is not the first to be truncated again.
"""

import math

import torch

from tdlrt.core_steps import CoreSteps
from tdlrt.transport import cross_grams, products

# σ ← aσ + bσ³ + cσ⁵, one after the other: each is the nearest to 1 on what those before it make of [0.01, 1], and the
# last takes that to 1 ± 0.013 (Amsel et al., arXiv:2505.16932, say why no four others come nearer).
QUINTICS = (
    (8.093369, -23.620432, 17.446153),
    (3.636586, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452616),
    (1.956172, -1.337508, 0.383853),
)
_ADAMW_SIZE = 0.2


class Muon(CoreSteps, torch.optim.AdamW):
    """Takes the arguments of AdamW; β₂, eps and amsgrad are for what is no core."""

    def move(self, group, cores, gradients, states):
        layers = [self.cores[core] for core in cores]
        ahead = torch._foreach_lerp(gradients, [state["exp_avg"] for state in states], group["betas"][0])
        rows = [layer.out_features_of(core.shape) for core, layer in zip(cores, layers)]
        factors = polar_factors([m.reshape(n, -1) for m, n in zip(ahead, rows)])
        steps = torch._foreach_mul(factors, [-group["lr"] * _size(layer) for layer in layers])
        torch._foreach_add_(cores, [step.view_as(core) for step, core in zip(steps, cores)])


def _size(layer):
    """Length of a step at learning rate 1, in the spectral norm."""
    return _ADAMW_SIZE * math.sqrt(max(layer.out_features_of(layer.weight_shape), layer.fan_in))


def polar_factors(matrices):
    """U Vᵀ of each matrix U Σ Vᵀ; all of one dtype. A singular value below a hundredth of the largest may become less
    than 1, and 0 stays 0.

    The products are those of the Gram matrix S of the shorter side, all matrices in one call each: as σ² is its
    eigenvalue, σ ← σ q(σ²) multiplies that side by q(S) and takes S to q(S)² S.
    """
    sides = [int(m.shape[0] > m.shape[1]) for m in matrices]
    matrices = _divided(matrices, torch._foreach_norm(matrices, math.inf))  # squares could underflow
    S = cross_grams(matrices, matrices, sides)
    norms = torch._foreach_norm(S)  # not below the square of the largest singular value, and nearer than a trace
    matrices, S = _divided(matrices, torch._foreach_sqrt(norms)), _divided(S, norms)
    Q = None
    for a, b, c in QUINTICS:
        rest = torch._foreach_mul(_times(S, S), c)  # q(S) − a
        torch._foreach_add_(rest, S, alpha=b)
        if (a, b, c) != QUINTICS[-1]:
            half = torch._foreach_add(_times(S, rest), S, alpha=a)
            S = torch._foreach_add(_times(half, rest), half, alpha=a)
        if Q is None:
            Q = rest
            for own in Q:
                own.diagonal().add_(a)
        else:
            Q = torch._foreach_add(_times(Q, rest), Q, alpha=a)
    return products(matrices, [[own] for own in Q], [[side] for side in sides])


def _times(a, b):
    """b[i] a[i], all in one call."""
    return products(a, [[x] for x in b], [[0]] * len(a))


def _divided(tensors, numbers):
    """By one number each; what is zero stays so."""
    least = torch.finfo(tensors[0].dtype).tiny
    return torch._foreach_div(tensors, torch._foreach_clamp_min(numbers, least))
