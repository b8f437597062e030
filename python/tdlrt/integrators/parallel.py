"""The one-gradient parallel integrator (Ceruti, Kusch, Lubich & Sulz 2024, arXiv 2412.00858).

All bases and the core advance from the old point: of the augmented core gradient only the known block and the blocks
with exactly one new mode are used, −λ V_iᵀ M_i; the others are zero. Cheaper than one-pass, first order, without its
descent bound. A layer whose every rank was kept at the augmented size found its truncation no bound: its step is
rejected and done again with the full augmented gradient, from the same pairs (see `TDLRT.step`).
"""

import torch

from tdlrt.integrators.one_pass import augmented_gradient, from_pairs


def parallel(optimizer, closure):
    return from_pairs(optimizer, closure, one_mode_blocks, keep=True)


def one_mode_blocks(e, pairs):
    """For each mode, the block in which that mode alone is new; zeros elsewhere."""
    total = e.core.new_zeros(e.shape)
    for mode in e.new_modes:
        r = e.core.shape[mode]
        bases = [b[:, r:] if i == mode else e.factors[i] for i, b in enumerate(e.bases)]
        block = list(e.known_block)
        block[mode] = slice(r, None)
        total[tuple(block)] = pairs.core_gradient(bases)
    return total


def saturated(e):
    """Whether truncation kept every new direction of every mode that could grow."""
    return e.grew and all(e.layer.core.shape[i] == e.shape[i] for i in e.new_modes)


def redo(e, optimizer):
    """Puts one layer back and enters the augmented point again with the full augmented gradient.

    False, with nothing changed, where that gradient is not finite: the step taken before stands.
    """
    gradient = augmented_gradient(e, optimizer.capture.pairs(e.name, e.layer)) * e.scale
    optimizer.reducer.average([gradient])
    gradient[e.known_block] = e.core_gradient[e.known_block]
    if not torch.isfinite(gradient).all():
        return False
    e.leave(optimizer.state)
    e.enter(optimizer.state)
    e.layer.core.grad = gradient
    return True
