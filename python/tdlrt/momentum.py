"""The part of a momentum that the bases cannot hold: of SGD's heavy ball, and of the first moment of Adam and Muon.

The core's buffer holds the momentum in the bases; in a step they grow to [U|V] and shrink to U' = [U|V]P, and what is
outside U' would be lost: directions outside the bases would start from rest in every step, and at μ = 0.9 bases turn at
a tenth of the core's rate. So every factor keeps the momentum of its gradient,

    m ← μ m + ∇_U L,   then   m ← (I − U'U'ᵀ) m P₁,   P₁ = UᵀU',        (n × r)

V spans (I − UUᵀ) m after the first of these, and the core's buffer receives, where mode i alone is new,

    V_iᵀ m_i (Mat_i(C) Mat_i(C)ᵀ)⁻¹ Mat_i(C),

which is V_iᵀ K_i projected on the rows of Mat_i(C), because ∇_{U_i} L = K_i Mat_i(C)ᵀ, K_i = Mat_i(∇_W L ×_{j≠i} U_jᵀ).
Together that is the momentum's projection on the tangent space, to first order in the step.

A first moment is such a buffer with μ = β₁ and gradients times 1 − β₁. Adam's second moment is one number for a whole
core (`adam.py`) and Muon has none, so that directions which just came in lack nothing.

Another optimiser may keep a second moment for every entry. From one of zero an entry of a new block would step by
(1 − β₁)/√(1 − β₂) = 3.2 learning rates whatever its gradient is: along signs, which is mostly noise. `begin` gives a
new block the mean second moment of the known one, and a first one that moves it by the gradient times the steps that
it stands for (`basis_every`).
"""

import torch

from tdlrt.core_steps import CoreSteps
from tdlrt.transport import LINEAR, SQUARED, by_dtype, cross_grams, products
from tucker_kernels.library import call, ops

OUTSIDE = "momentum_outside"  # in a core's state: m or None, per mode


def goes_along(base, group):
    """Whether the base optimiser has a momentum in this group that is kept outside the bases, too."""
    return isinstance(base, (torch.optim.SGD, CoreSteps)) and bool(_rate(group))


def _rate(group):
    """μ, by which a momentum decays in a step."""
    return group["betas"][0] if "betas" in group else group["momentum"]


def advance(m, gradient, group, clip=1.0):
    """μ m + w ∇_U L with torch's conventions: the descent direction when maximising; w is 1 − β₁, of SGD 1 in the first
    step and then 1 − dampening."""
    weight = -clip if group["maximize"] else clip
    if "betas" in group:
        weight = weight * (1 - group["betas"][0])
    elif m is not None:
        weight = weight * (1 - group["dampening"])
    if m is None:
        return weight * gradient
    if isinstance(weight, torch.Tensor):  # as alpha it would be read on the host
        return (_rate(group) * m).add_(weight * gradient)
    return (_rate(group) * m).add_(gradient, alpha=weight)


def bring_in(moving):
    """Moves each m into the block of the augmented buffer in which its mode alone is new.

    moving: [(expansion, state of its core with the buffer at the augmented shape)]; one call for all of them.
    """
    places = [
        (e, next(state[key] for key in LINEAR if key in state), mode, m)
        for e, state in moving
        for mode, m in enumerate(state.pop(OUTSIDE))
        if m is not None and e.shape[mode] > e.core.shape[mode]
    ]
    for group in by_dtype([m for *_, m in places]):
        members = [places[i] for i in group]
        cores, modes = [e.core for e, *_ in members], [mode for _, _, mode, _ in members]
        new = [e.bases[mode][:, e.core.shape[mode] :] for e, _, mode, _ in members]
        sides = cross_grams(new, [m for *_, m in members], [1] * len(members))
        found = call(ops.gram_solve.default, cores, modes, sides)
        blocks = products(cores, [[X] for X in found], [[mode] for mode in modes])
        for (e, buffer, mode, _), block in zip(members, blocks):
            place = list(e.known_block)
            place[mode] = slice(e.core.shape[mode], None)
            buffer[tuple(place)] = block


def take_out(momenta, bases):
    """Takes what the truncated basis U' now holds out of each m in its coordinates: the core's buffer has it."""
    inside = cross_grams(bases, momenta, [1] * len(momenta))
    for m, known in zip(momenta, products(bases, [[x] for x in inside], [[1]] * len(momenta), transpose=True)):
        m.sub_(known)


def begin(expansions, optimizer_state, group_of, steps):
    """Moments of new blocks, before the step of a base that keeps second ones by entry; nothing where it has none yet.

    steps: how many the gradient stands for. Entries that are exactly zero (of unused columns) do not count in the mean.
    """
    for e in expansions:
        state = optimizer_state.get(e.layer.core, {})
        if not e.grew or not {"exp_avg", "exp_avg_sq", "step"} <= state.keys() or state["exp_avg_sq"].shape != e.shape:
            continue
        group = group_of(e.layer.core)
        beta = group["betas"][0] if "betas" in group else 0.0
        if beta:  # after the step m/(1 − βᵗ) is to be steps · gradient
            weight = (steps * (1 - beta ** (state["step"].double() + 1)) - (1 - beta)) / beta
            first = e.layer.core.grad * (-weight if group.get("maximize") else weight)
            first[e.known_block] = state["exp_avg"][e.known_block]
            state["exp_avg"] = first
        for key in SQUARED:
            if key in state:
                known = state[key][e.known_block]
                second = (known.sum() / (known > 0).sum().clamp(min=1)).expand(e.shape).clone()
                second[e.known_block] = known
                state[key] = second


def decay(state, group):
    """A step that moves the core alone: no gradient comes in outside the bases."""
    if OUTSIDE in state:
        state[OUTSIDE] = [None if m is None else _rate(group) * m for m in state[OUTSIDE]]
