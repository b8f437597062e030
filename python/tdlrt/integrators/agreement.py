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
from dataclasses import dataclass, field

import torch

from tdlrt.expansion import Expansion
from tdlrt.transport import cross_grams, pad, products

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

    gradients: [∇_C L, ∇_{U_1} L, …] as the backward pass of this process left them. sides: (from the core, from the
    factor) of every new mode, rows of ω's columns.
    """

    expansion: Expansion
    gradient: torch.Tensor
    gradients: list
    contraction: object
    sides: list = field(default_factory=list)

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
        new = [[side[e.core.shape[mode] :].flatten() for side in pair] for mode, pair in zip(e.new_modes, self.sides)]
        found, known = map(torch.cat, zip(*new))
        blocks = found, known, rounding * torch.linalg.vector_norm(e.core)
        if not torch.cat([*cores[:2], found, known]).isfinite().all():
            return 1.0, False  # left to the finiteness check, which names it
        fits = [_fit(known, found) for found, known, _ in (cores, blocks)]
        scale = min(fits, key=lambda fit: fit[1])[0]
        for found, known, rounding in (cores, blocks):
            difference = torch.linalg.vector_norm(known - scale * found)
            if difference > self.tolerance * torch.linalg.vector_norm(known) and difference > rounding:
                return scale, True
        return scale, False


def _fit(known, found):
    """The c that makes c·found nearest to known, and the part of known that is left."""
    square = float(found.dot(found))
    scale = float(known.dot(found)) / square if square > 0 else 1.0
    left = torch.linalg.vector_norm(known - scale * found) / torch.linalg.vector_norm(known)
    return scale, float(left)


def _multiply(comparisons):
    """Sets the known blocks and multiplies by ω, all layers in two calls; reads nothing from the device."""
    for c in comparisons:
        c.gradient[c.expansion.known_block] = c.gradients[0]
    places = [(c, mode) for c in comparisons for mode in c.expansion.new_modes]
    cores = [c.expansion.core for c, _ in places]
    probes = [[_probe(core.shape[mode], core.dtype, core.device)] for core, (_, mode) in zip(cores, places)]
    factors = [c.gradients[1 + mode] for c, mode in places]
    modes = [[mode] for _, mode in places]
    thin = products(cores + factors, probes + probes, modes + [[1]] * len(places), transpose=True)
    for i, (c, mode) in enumerate(places):  # zeros take the blocks where other modes are new out of the sum
        shape = list(c.expansion.shape)
        shape[mode] = _COLUMNS
        thin[i] = pad(thin[i], shape)
    wide = [c.gradient for c, _ in places] + [c.expansion.bases[mode] for c, mode in places]
    sides = cross_grams(wide, thin, [mode for _, mode in places] + [1] * len(places))
    for (c, _), *pair in zip(places, sides, sides[len(places) :]):
        c.sides.append(pair)


def settle(comparisons, reducer):
    """Brings every augmented gradient to the scale of the gradients; one synchronisation for all layers.

    Raises RuntimeError where gradients are no multiple of what the pairs give; on all processes if on one.
    """
    if not comparisons:
        return
    _multiply(comparisons)
    flags = [float(c.settle(*read)) for c, read in zip(comparisons, _scales(comparisons))]
    flags = reducer.maximum(torch.tensor(flags, device=comparisons[0].gradient.device)).tolist()
    bad = [c.expansion.name for flag, c in zip(flags, comparisons) if flag]
    if bad:
        raise RuntimeError(
            f"the gradients of {', '.join(bad)} are not a multiple of what its inputs and output gradients give. The "
            "loss may use the weight outside the layer (a penalty), or the gradients were changed by more than a "
            "scaling: use integrator='two_pass'. Or they were zeroed in place: use the optimizer's zero_grad()"
        )


def _scales(comparisons):
    """For each layer c, and the disagreements of core with factors and of pairs with factors, 1 where rounding ends."""
    found, known = (torch.cat([pair[i] for c in comparisons for pair in c.sides]).double() for i in (0, 1))
    rows = [
        n
        for c in comparisons
        for i in c.expansion.new_modes
        for r in (c.expansion.core.shape[i],)
        for n in (r, c.expansion.shape[i] - r)
    ]  # old ones and new ones
    sums = torch.stack([found * found, found * known, known * known], 1).sum(2)
    sums = iter(torch.segment_reduce(sums, "sum", lengths=torch.tensor(rows, device=sums.device), axis=0).tolist())
    scales = []
    for c in comparisons:
        parts = [(next(sums), next(sums)) for _ in c.sides]
        (ff, fk, kk), (new_ff, new_fk, new_kk) = (map(sum, zip(*side)) for side in zip(*parts))
        scale = new_fk / new_ff if new_ff > 0 else 1.0
        left = ff - 2 * fk + kk, scale * scale * new_ff - 2 * scale * new_fk + new_kk
        scales.append((scale, [_root(d, size) / c.tolerance for d, size in zip(left, (kk, new_kk))]))
    return scales


def _root(difference, size):
    """√(difference / size); the difference was found by cancellation and may be a little below zero."""
    return 0.0 if difference <= 0 else math.sqrt(difference / size) if size > 0 else math.inf
