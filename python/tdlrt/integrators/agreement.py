"""Whether the kept pairs explain the gradients that the backward pass left, and in which scale.

Between the backward pass and the step gradients may have been multiplied by some c (loss unscaling, clipping); the
pairs have not, so what is contracted from them must be. With B the augmented core gradient, mode i whole and the other
modes old,

    [U_i|V_i]ᵀ ∇_{U_i} L = Mat_i(B) Mat_i(C)ᵀ

Its rows U_i hold ∇_C L alone, which the backward pass has given: they compare two gradients and no pair. Its rows V_i
are new blocks, which come from the pairs: they give c. Both sides are multiplied by the same few random columns ω
(Freivalds 1977), which keeps the relative size of an error and makes the check as cheap as reading B once.

Where this disagrees, by a mistake or because ∇_{U_i} L all but vanishes outside U_i, the block of the old core is
contracted as well and compared with ∇_C L.
"""

import functools
import math
from dataclasses import dataclass

import torch

from tdlrt.expansion import Expansion
from tucker_kernels.library import call, ops

# Largest ‖known − c found‖ / ‖known‖ taken for rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.2
_COLUMNS = 8


@functools.lru_cache(maxsize=512)
def _probe(size, dtype, device):
    """The columns ω, (size, 8): normal entries, the same on every process."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, _COLUMNS, generator=generator, dtype=torch.float64).to(dtype).to(device)


@dataclass
class Comparison:
    """One layer's augmented gradient, and what is known of it twice.

    sides: (from the core, from the factor) for the old rows of all new modes, and for the new rows.
    """

    expansion: Expansion
    gradient: torch.Tensor
    gradients: list
    contraction: object
    sides: tuple

    @property
    def tolerance(self):
        return _HALF_TOLERANCE if self.contraction.half else _TOLERANCE[self.gradient.dtype]

    def settle(self, scale, excess):
        """Multiplies the new blocks by c; whether pairs and gradients disagree beyond rounding."""
        e, bad = self.expansion, False
        if max(excess) > 1:
            scale, bad = self._compare_cores()
        e.scale = scale
        if abs(scale - 1) > 8 * torch.finfo(self.gradient.dtype).eps:
            self.gradient.mul_(scale)
        self.gradient[e.known_block] = self.gradients[0]
        return bad

    def _compare_cores(self):
        e = self.expansion
        # What cancellation in the sums over pixels can explain.
        rounding = 64 * self.contraction.rounding()
        cores = self.contraction.old_gradient(e).flatten(), self.gradients[0].flatten(), rounding
        found, known = self.sides[1]
        blocks = torch.cat(found), torch.cat(known), rounding * torch.linalg.vector_norm(e.core)
        fits = [_fit(known, found) for found, known, _ in (cores, blocks)]
        scale = min(fits, key=lambda fit: fit[1])[0]
        for found, known, rounding in (cores, blocks):
            difference = torch.linalg.vector_norm(known - scale * found)
            # NaN is left to the finiteness check, which names it.
            if difference > self.tolerance * torch.linalg.vector_norm(known) and difference > rounding:
                return scale, True
        return scale, False


def _fit(known, found):
    """The c that makes c·found nearest to known, and the part of known that is left."""
    square = float(found.dot(found))
    scale = float(known.dot(found)) / square if square > 0 else 1.0
    left = torch.linalg.vector_norm(known - scale * found) / torch.linalg.vector_norm(known)
    return scale, float(left)


def compare(e, augmented, gradients, contraction):
    """Sets the known block of `augmented` and multiplies by ω; reads nothing from the device.

    gradients: [∇_C L, ∇_{U_1} L, …] as the backward pass of this process left them.
    """
    augmented[e.known_block] = gradients[0]
    sides = ([], []), ([], [])
    for mode in e.new_modes:
        r = e.core.shape[mode]
        omega = _probe(r, e.core.dtype, e.core.device)
        block = list(e.known_block)
        block[mode] = slice(None)
        thin = call(ops.mode_dot.default, e.core, omega, mode, True)
        core = call(ops.cross_gram.default, augmented[tuple(block)], thin, mode)
        thin = call(ops.mode_dot.default, gradients[1 + mode], omega, 1, True)
        factor = call(ops.cross_gram.default, e.bases[mode], thin, 1)
        for (found, known), rows in zip(sides, (slice(r), slice(r, None))):
            found.append(core[rows].flatten())
            known.append(factor[rows].flatten())
    return Comparison(e, augmented, gradients, contraction, sides)


def settle(comparisons, reducer):
    """Brings every augmented gradient to the scale of the gradients; one synchronisation for all layers.

    Raises RuntimeError where gradients are no multiple of what the pairs give; on all processes if on one.
    """
    if not comparisons:
        return
    flags = [float(c.settle(*read)) for c, read in zip(comparisons, _scales(comparisons))]
    flags = reducer.maximum(torch.tensor(flags, device=comparisons[0].gradient.device)).tolist()
    bad = [c.expansion.name for flag, c in zip(flags, comparisons) if flag]
    if bad:
        raise RuntimeError(
            f"the gradients of {', '.join(bad)} are not a multiple of what its inputs and output gradients give. The "
            "loss may use the weight outside the layer (a penalty), or the gradients were changed by more than a "
            "scaling; use integrator='two_pass'"
        )


def _scales(comparisons):
    """For each layer c, and the disagreements of core with factors and of pairs with factors, 1 where rounding ends."""
    parts = [side for c in comparisons for side in c.sides]
    lengths = torch.tensor([sum(len(piece) for piece in found) for found, _ in parts])
    found, known = (torch.cat([piece.double() for part in parts for piece in part[i]]) for i in (0, 1))
    products = torch.stack([found * found, found * known, known * known], 1)
    sums = torch.segment_reduce(products, "sum", lengths=lengths.to(products.device), axis=0).view(-1, 2, 3)
    scales = []
    for c, ((ff, fk, kk), (new_ff, new_fk, new_kk)) in zip(comparisons, sums.tolist()):
        scale = new_fk / new_ff if new_ff > 0 else 1.0
        left = ff - 2 * fk + kk, scale * scale * new_ff - 2 * scale * new_fk + new_kk
        scales.append((scale, [_root(d, size) / c.tolerance for d, size in zip(left, (kk, new_kk))]))
    return scales


def _root(difference, size):
    """√(difference / size); the difference was found by cancellation and may be a little below zero."""
    return 0.0 if difference <= 0 else math.sqrt(difference / size) if size > 0 else math.inf
