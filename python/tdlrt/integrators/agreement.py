"""Whether the kept pairs explain the gradients that the backward pass left, and in which scale.

Between the backward pass and the step gradients may have been multiplied by some c (loss unscaling, clipping); the
pairs have not, so what is contracted from them must be. Parts of the augmented core gradient are known twice, which
gives c and shows when something else than a multiplication happened:

    the block of the old core              =  ∇_C L
    Mat_i(block with V_i, old otherwise) Mat_i(C)ᵀ  =  V_iᵀ ∇_{U_i} L
"""

from dataclasses import dataclass

import torch

from tdlrt.expansion import Expansion
from tucker_kernels.functions import CrossGram

# Largest ‖known − c found‖ / ‖known‖ taken for rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.2


@dataclass
class Comparison:
    """gradient: the contraction times c. excess: the disagreement, in units of what is taken for rounding."""

    expansion: Expansion
    gradient: torch.Tensor
    excess: torch.Tensor
    difference: torch.Tensor
    pairs: list

    def beyond_rounding(self):
        """Whether the difference exceeds what cancellation in the sums over pixels can explain."""
        eps = max(torch.finfo(dy.dtype).eps for _, dy in self.pairs)
        size = sum(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(dy) for x, dy in self.pairs)
        weight = 1 + torch.linalg.vector_norm(self.expansion.core)
        return bool(self.difference > 64 * eps * size * weight)


def compare(e, contracted, gradients, pairs):
    """Scales `contracted` in place, and sets the expansion's scale.

    gradients: [∇_C L, ∇_{U_1} L, …] as the backward pass of this process left them.
    """
    known_core, *known_factors = gradients
    known, found = [known_core.flatten()], [contracted[e.known_block].flatten()]
    for mode, r in enumerate(e.core.shape):
        if e.shape[mode] > r:
            block = list(e.known_block)
            block[mode] = slice(r, None)
            V = e.bases[mode][:, r:]
            known.append((V.T @ known_factors[mode]).flatten())
            found.append(CrossGram.apply(contracted[tuple(block)], e.core, mode).flatten())
    known, found = torch.cat(known), torch.cat(found)
    square = found.dot(found)
    e.scale = scale = torch.where(square > 0, known.dot(found) / square, 1.0)
    size = torch.linalg.vector_norm(known)
    difference = torch.linalg.vector_norm(known - scale * found)
    half = any(dy.dtype in (torch.bfloat16, torch.float16) for _, dy in pairs)
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE[known.dtype]
    excess = difference / torch.where(size > 0, size, 1.0) / tolerance
    return Comparison(e, contracted.mul_(scale), excess, difference, pairs)


def refuse_disagreement(comparisons, reducer):
    """Raises RuntimeError where gradients are no multiple of what the pairs give; on all processes if on one."""
    if not comparisons:
        return
    excess = torch.stack([c.excess.double() for c in comparisons])
    # NaN is left to the finiteness check, which names it.
    flags = [float(x > 1 and c.beyond_rounding()) for x, c in zip(excess.tolist(), comparisons)]
    flags = reducer.maximum(torch.tensor(flags, device=excess.device)).tolist()
    bad = [c.expansion.name for flag, c in zip(flags, comparisons) if flag]
    if bad:
        raise RuntimeError(
            f"the gradients of {', '.join(bad)} are not a multiple of what its inputs and output gradients give. The "
            "loss may use the weight outside the layer (a penalty), or the gradients were changed by more than a "
            "scaling; use integrator='two_pass'"
        )
