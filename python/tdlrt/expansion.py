"""One layer on its way through a step: old point, augmented bases and core, and back to the truncated ones."""

import math
from dataclasses import dataclass, field

import torch

import tucker_kernels as tk
from tdlrt import momentum
from tdlrt.layers import TuckerLayer
from tdlrt.rank_choice import Spectrum, slice_squares
from tdlrt.transport import by_dtype, check_shapes, corner, follow_dtype, pad, pad_state, project_states


class NonFiniteError(FloatingPointError):
    """A gradient holds NaN or Inf. Factors, cores, ranks and all other parameters are as they were before the step."""


@dataclass
class Expansion:
    """The layer's point before the step, and its augmented bases [U|V] (U itself for a mode that does not grow).

    parameters: the layer's factors, whose data `factors` are. shape: of the augmented core.
    group: the core's parameter group, where its momentum goes along (`momentum.py`); momenta: {mode: (momentum before
    the step or None, gradient)} of the factors; ahead: {mode: the two together}, where nothing changed the gradient
    since. clip: what the gradients were multiplied by after that. expected_scale: what they will be multiplied by
    between the choice of directions and the step.
    state: of the optimiser, before the step. core_gradient: of the augmented core, once the integrator has run.
    scale: factor between what the kept pairs give and the gradients to step with.
    """

    name: str
    layer: TuckerLayer
    core: torch.Tensor
    parameters: list
    factors: list
    bases: list
    shape: tuple
    group: dict | None = None
    momenta: dict = field(default_factory=dict)
    ahead: dict = field(default_factory=dict)
    clip: torch.Tensor | float = 1.0
    expected_scale: float = 1.0
    state: dict = field(default_factory=dict)
    core_gradient: torch.Tensor | None = None
    scale: torch.Tensor | float = 1.0

    @classmethod
    def at(cls, name, layer, optimizer):
        """The layer's point now, nothing augmented. Raises ValueError where the optimiser's state is of other ranks."""
        core, parameters = layer.core, list(layer.factors)
        state = optimizer.state.get(core, {})
        check_shapes(name, core, state)
        follow_dtype(core, state)
        factors = [None if f is None else f.data for f in parameters]
        group = optimizer.momentum_group(core)
        return cls(name, layer, core.data, parameters, factors, list(factors), tuple(core.shape), group)

    def extend(self, mode, directions):
        """Augments a basis by orthonormal directions outside it."""
        basis = self.bases[mode] = torch.cat([self.factors[mode], directions], 1)
        self.shape = (*self.shape[:mode], basis.shape[1], *self.shape[mode + 1 :])

    def direction(self, mode, gradient, optimizer):
        """The direction a basis is to grow in: the factor's gradient, with its momentum where there is one.

        Both are kept for `advanced`, after the step.
        """
        full = self.core.shape[mode] == self.factors[mode].shape[0]
        if self.group is None or (full and optimizer.captured is None):  # at fixed capacity columns may be unused
            return gradient
        before = optimizer.state.get(self.layer.core, {}).get(momentum.OUTSIDE)
        self.momenta[mode] = None if before is None else before[mode], gradient
        self.ahead[mode] = momentum.advance(*self.momenta[mode], self.group, self.expected_scale)
        return self.ahead[mode]

    @property
    def grew(self):
        return self.shape != self.core.shape

    @property
    def new_modes(self):
        return [i for i, (n, r) in enumerate(zip(self.shape, self.core.shape)) if n > r]

    @property
    def known_block(self):
        """The block of an augmented core that belongs to the old bases."""
        return corner(self.core.shape)

    def leave(self, optimizer_state):
        """Back to the old point, as if nothing had happened."""
        self.layer.assign(self.core, self.factors)
        if self.state:
            optimizer_state[self.layer.core] = self.state
        else:
            optimizer_state.pop(self.layer.core, None)

    def advanced(self, mode):
        """The momentum of a factor's gradient with the gradient of this step."""
        if mode in self.ahead and isinstance(self.clip, float) and self.clip == self.expected_scale:
            return self.ahead[mode]
        return momentum.advance(*self.momenta[mode], self.group, self.clip)


def carried_states(moves, optimizer_state):
    """The states of cores at their truncated points, one call for all; moves: [(expansion, shape of the augmented core,
    projections, each cut to its rank, rotated bases)]. Empty where there is none."""
    states = [optimizer_state.get(e.layer.core, {}) for e, *_ in moves]
    places = [(k, mode) for k, (state, (e, *_)) in enumerate(zip(states, moves)) if state for mode in e.momenta]
    new, carried = project_states(
        [(state, shape, P) for state, (_, shape, P, _) in zip(states, moves)],
        [(moves[k][0].advanced(mode), moves[k][2][mode]) for k, mode in places],
    )
    momentum.take_out(carried, [moves[k][3][mode] for k, mode in places])
    for (k, mode), m in zip(places, carried):
        new[k].setdefault(momentum.OUTSIDE, [None] * len(moves[k][3]))[mode] = m
    return new


def expand(layers, optimizer, expected_scale=1.0):
    """Augmented bases of all layers and modes from the factors' gradients and momenta. layers: {name: layer}.

    A mode whose factor has no gradient keeps its basis. Raises `NonFiniteError`.
    """
    expansions = [Expansion.at(name, layer, optimizer) for name, layer in layers.items()]
    for e in expansions:
        e.expected_scale = expected_scale
    gradients = {
        (e.name, mode): e.direction(mode, e.parameters[mode].grad, optimizer)
        for e in expansions
        for mode in e.layer.modes
        if e.parameters[mode].grad is not None
    }
    expand_along(expansions, gradients)
    return expansions


def expand_along(expansions, directions):
    """Augments each basis by the part of its directions outside it; one call of `tangent_basis` for everything.

    directions: {(layer name, mode): matrix of the factor's shape}. Raises `NonFiniteError`, naming layer and mode.
    """
    places = [
        (e, mode)
        for e in expansions
        for mode in e.layer.modes
        if (e.name, mode) in directions and e.factors[mode].shape[1] < e.factors[mode].shape[0]
    ]
    for group in by_dtype([e.factors[mode] for e, mode in places]):
        members = [places[i] for i in group]
        bases = [e.factors[mode] for e, mode in members]
        found, counts = tk.tangent_basis(bases, [directions[e.name, mode] for e, mode in members])
        for (e, mode), V, count in zip(members, found, counts.tolist()):
            if count < 0:
                raise NonFiniteError(f"the gradient of {e.name}.factors.{mode} holds NaN or Inf")
            e.extend(mode, V[:, :count])


def enter(expansions, optimizer_state):
    """Moves layers and their optimiser state to the augmented points; the weights stay what they were."""
    moving = []
    for e in expansions:
        e.state = dict(optimizer_state.get(e.layer.core, {}))
        if e.state:
            optimizer_state[e.layer.core] = state = pad_state(e.state, e.core.shape, e.shape)
            if momentum.OUTSIDE in state:
                if e.layer.train_bases:
                    moving.append((e, state))
                else:
                    momentum.decay(state, e.group)
        e.layer.assign(pad(e.core, e.shape), e.bases)
    momentum.bring_in(moving)


def truncate(rules, optimizer_state, choose=None):
    """HOSVD of all augmented cores in one call per dtype; rules: [(expansion, hosvd_truncate's arguments for it)].

    choose: replaces `hosvd_truncate`'s choice of adaptive ranks, see `RankChoice`.

    Returns the relative truncation error per layer name. Raises `NonFiniteError` for a core that the update made
    non-finite, after that layer was put back.
    """
    errors, broken = {}, []
    for group in _by_rule(rules):
        found = []
        for e, core, projections, error in _truncated(group, choose):
            if error != error:
                e.leave(optimizer_state)
                broken.append(e.name)
            else:
                errors[e.name] = error
                found.append((e, core, projections))
        _move(found, optimizer_state)
    if broken:
        raise NonFiniteError(f"the update made the core of {', '.join(broken)} NaN or Inf; those layers were put back")
    return errors


def _truncated(group, choose):
    """[(expansion, truncated core at its old size, projections cut to their ranks, error)] of one call."""
    arguments = {key: [rule[key] for _, rule in group] for key in group[0][1]}
    (mode,) = set(arguments.pop("tolerance_mode"))
    by_choice = choose is not None and "tol" in arguments
    if by_choice:  # rotates each core to HOSVD form, whole
        most = [[min(*pair) for pair in zip(e.shape, rule["max_rank"])] for e, rule in group]
        arguments = {"tol": 0.0, "min_rank": most, "max_rank": most}
    members = [e for e, _ in group]
    cores, projections, ranks, errors = tk.hosvd_truncate(
        [e.layer.core.data for e in members], modes=[e.layer.modes for e in members], tolerance_mode=mode, **arguments
    )
    ranks, errors = ranks.tolist(), errors.tolist()
    if by_choice:
        ranks, errors = _choose(choose, group, cores, ranks, errors)
    cut = [[None if p is None else p[:, :r] for p, r in zip(*each)] for each in zip(projections, ranks)]
    return list(zip(members, cores, cut, errors))


def _move(found, optimizer_state):
    """Moves layers and their optimiser state to truncated points; found: [(expansion, core, projections)]."""
    rotated = rotated_bases([(e, projections) for e, _, projections in found])
    moves = [(e, core.shape, projections, bases) for (e, core, projections), bases in zip(found, rotated)]
    for (e, core, projections), bases, state in zip(found, rotated, carried_states(moves, optimizer_state)):
        if state:
            optimizer_state[e.layer.core] = state
        ranks = [n if p is None else p.shape[1] for n, p in zip(core.shape, projections)]
        e.layer.assign(core[corner(ranks)].contiguous(), bases)


def rotated_bases(projected):
    """The augmented bases of each (expansion, projections) in the coordinates of these, one call for all.

    A mode without a projection keeps its basis.
    """
    pairs = [(basis, p) for e, projections in projected for basis, p in zip(e.bases, projections) if p is not None]
    rotated = iter(tk.rotate_bases(*map(list, zip(*pairs))) if pairs else ())
    return [[b if p is None else next(rotated) for b, p in zip(e.bases, projections)] for e, projections in projected]


def _choose(choose, group, cores, ranks, error):
    """Ranks and errors by `choose`, for cores in HOSVD form that were cut to `ranks` with `error`."""
    ranks = [tuple(r[: core.ndim]) for r, core in zip(ranks, cores)]
    finite = [k for k, err in enumerate(error) if err == err]
    if not finite:
        return ranks, error
    squares = slice_squares([cores[k][corner(ranks[k])] for k in finite])
    spectra = [
        Spectrum(group[k][0].layer, own, group[k][1]["min_rank"], ranks[k], group[k][1]["tol"])
        for k, own in zip(finite, squares)
    ]
    chosen = choose(spectra)
    kept = torch.stack([torch.linalg.vector_norm(cores[k][corner(r)].double()) for k, r in zip(finite, chosen)]) ** 2
    for k, r, own, part in zip(finite, chosen, squares, kept.tolist()):
        before = sum(own[0])
        left = (1 - error[k] ** 2) * (part / before if before > 0 else 1.0)
        ranks[k], error[k] = r, math.sqrt(max(0.0, 1 - left))
    return ranks, error


def _by_rule(rules):
    groups = {}
    for e, rule in rules:
        groups.setdefault((e.core.dtype, e.core.device, "tol" in rule), []).append((e, rule))
    return groups.values()
