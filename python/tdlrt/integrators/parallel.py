"""The one-gradient parallel integrator (Ceruti, Kusch, Lubich & Sulz 2024, arXiv 2412.00858).

All bases and the core advance from the old point: of the augmented core gradient only the known block and the blocks
with exactly one new mode are used, −λ V_iᵀ M_i; the others are zero. First order, without the descent bound of
one-pass. A layer whose every rank was kept at the augmented size found its truncation no bound: its step is rejected
and done again with the full augmented gradient, from the same pairs (see `TDLRT.step`).
"""

import itertools

import torch

from tdlrt.expansion import enter
from tdlrt.integrators.one_pass import augmented_gradient, from_pairs


def parallel(optimizer, closure):
    return from_pairs(optimizer, closure, one_mode_blocks, keep=True)


def one_mode_blocks(e, pairs):
    """The augmented gradient with zeros in all blocks where two or more modes are new.

    Computed whole: kernels read a pair once for all blocks, which costs less than one call for each block wanted.
    """
    total = augmented_gradient(e, pairs)
    for modes in itertools.combinations(e.new_modes, 2):
        total[tuple(slice(r, None) if i in modes else slice(None) for i, r in enumerate(e.core.shape))] = 0
    return total


def saturated(e):
    """Whether truncation kept every new direction of every mode that could grow."""
    return e.grew and all(e.layer.core.shape[i] == e.shape[i] for i in e.new_modes)


def redo(e, optimizer):
    """Puts one layer back and enters the augmented point again with the full augmented gradient.

    False, with nothing changed, where that gradient is not finite: the step taken before stands.
    """
    gradient = augmented_gradient(e, optimizer.kept.pairs(e.name, e.layer)) * e.scale
    optimizer.reducer.average([gradient])
    gradient[e.known_block] = e.core_gradient[e.known_block]
    if not torch.isfinite(gradient).all():
        return False
    e.leave(optimizer.state)
    enter([e], optimizer.state)
    e.layer.core.grad = gradient
    return True
