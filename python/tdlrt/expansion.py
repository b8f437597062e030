"""One layer on its way through a step: old point, augmented bases and core, and back to the truncated ones."""

from dataclasses import dataclass, field

import torch

import tucker_kernels as tk
from tdlrt.layers import TuckerLayer
from tdlrt.transport import corner, pad, pad_state, polish, project_state


class NonFiniteError(FloatingPointError):
    """A gradient holds NaN or Inf. Factors, cores, ranks and all other parameters are as they were before the step."""


@dataclass
class Expansion:
    """The layer's point before the step, and its augmented bases [U|V] (U itself for a mode that does not grow)."""

    name: str
    layer: TuckerLayer
    core: torch.Tensor
    factors: list
    bases: list
    state: dict = field(default_factory=dict)

    @property
    def shape(self):
        """Shape of the augmented core."""
        return tuple(n if b is None else b.shape[1] for n, b in zip(self.core.shape, self.bases))

    def enter(self, optimizer_state):
        """Moves the layer and its optimiser state to the augmented point; the weight stays what it was."""
        self.state = dict(optimizer_state.get(self.layer.core, {}))
        if self.state:
            optimizer_state[self.layer.core] = pad_state(self.state, self.core.shape, self.shape)
        self.layer.assign(pad(self.core, self.shape), self.bases)

    def leave(self, optimizer_state):
        """Back to the old point, as if nothing had happened."""
        self.layer.assign(self.core, self.factors)
        if self.state:
            optimizer_state[self.layer.core] = self.state

    def truncate(self, optimizer_state, core, projections, ranks):
        """Moves layer and state from the augmented point to the truncated one."""
        P = [None if p is None else p[:, :r].contiguous() for p, r in zip(projections, ranks)]
        own = self.layer.core
        if optimizer_state.get(own):
            optimizer_state[own] = project_state(optimizer_state[own], own.shape, P)
        bases = [b if p is None else polish(b @ p) for b, p in zip(self.bases, P)]
        self.layer.assign(core[corner(ranks)].contiguous(), bases)


def expand(layers):
    """Augmented bases of all layers and modes, from the factors' gradients, in one call of `tangent_basis`.

    layers: {name: layer}. A mode whose factor has no gradient keeps its basis. Raises `NonFiniteError`.
    """
    places, bases, directions = [], [], []
    expansions = []
    for name, layer in layers.items():
        factors = [None if f is None else f.data for f in layer.factors]
        expansions.append(Expansion(name, layer, layer.core.data, factors, list(factors)))
        for mode in layer.modes:
            gradient = layer.factors[mode].grad
            if gradient is not None and factors[mode].shape[1] < factors[mode].shape[0]:
                places.append((expansions[-1], mode))
                bases.append(factors[mode])
                directions.append(gradient)
    for group in _by_dtype(bases):
        found, counts = tk.tangent_basis([bases[i] for i in group], [directions[i] for i in group])
        for i, V, count in zip(group, found, counts.tolist()):
            expansion, mode = places[i]
            if count < 0:
                raise NonFiniteError(f"the gradient of {expansion.name}.factors.{mode} holds NaN or Inf")
            expansion.bases[mode] = torch.cat([bases[i], V[:, :count]], 1)
    return expansions


def _by_dtype(tensors):
    """Indices grouped by dtype and device: one call of an operator each (one group in nearly every model)."""
    groups = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(i)
    return groups.values()


def truncate(rules, optimizer_state):
    """HOSVD of all augmented cores in one call per dtype; rules: [(expansion, hosvd_truncate's arguments for it)].

    Returns the relative truncation error per layer name. Raises `NonFiniteError` for a core that the update made
    non-finite, after that layer was put back.
    """
    errors, broken = {}, []
    for group in _by_rule(rules):
        members = [e for e, _ in group]
        kinds = [rule for _, rule in group]
        arguments = {key: [rule[key] for rule in kinds] for key in kinds[0]}
        mode = arguments.pop("tolerance_mode")[0]
        cores, projections, ranks, error = tk.hosvd_truncate(
            [e.layer.core.data for e in members],
            modes=[e.layer.modes for e in members],
            tolerance_mode=mode,
            **arguments,
        )
        for e, core, P, r, err in zip(members, cores, projections, ranks.tolist(), error.tolist()):
            if err != err:
                e.leave(optimizer_state)
                broken.append(e.name)
                continue
            errors[e.name] = err
            e.truncate(optimizer_state, core, P, r[: core.ndim])
    if broken:
        raise NonFiniteError(f"the update made the core of {', '.join(broken)} NaN or Inf; those layers were put back")
    return errors


def _by_rule(rules):
    groups = {}
    for e, rule in rules:
        groups.setdefault((e.core.dtype, e.core.device, "tol" in rule), []).append((e, rule))
    return groups.values()
