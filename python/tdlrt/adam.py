"""Adam and AdamW with one second moment for a whole core.

A direction that has just come in has no second moment of its own yet, and the others change into each other. One number
for all entries of a core, the mean of their squares,

    v ← β₂ v + (1 − β₂) ‖∇_C L‖² / (entries of C),

is the same in all bases, and dividing by its root keeps the step along the momentum. Everything else is torch's, for
the other parameters too; a core's second moments have torch's keys and no dimensions.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from tdlrt.core_steps import CoreSteps
from tdlrt.transport import SQUARED


class OneSecondMoment(CoreSteps):
    """For `torch.optim.Adam` and `AdamW`.

    entries: {core: how many of its entries are in use, on its device}, of those where not all are.
    """

    entries: Mapping[torch.Tensor, torch.Tensor] = MappingProxyType({})

    def move(self, group, cores, gradients, states):
        lr, (beta1, beta2) = group["lr"], group["betas"]
        norms = torch._foreach_norm(gradients)
        entries = [self.entries.get(core, core.numel()) for core in cores]
        squares = torch.stack([norm**2 / n for norm, n in zip(norms, entries)])
        second = self._moved(states, "exp_avg_sq", lambda before: torch.lerp(before, squares, 1 - beta2))
        if group["amsgrad"]:
            second = self._moved(states, "max_exp_avg_sq", lambda before: torch.maximum(before, second))
        steps = torch.stack([state["step"] for state in states]).to(second)
        sizes = (second / (1 - beta2**steps)).sqrt() + group["eps"]
        weights = -lr / (1 - beta1**steps) / sizes
        first = [state["exp_avg"] for state in states]
        torch._foreach_add_(cores, torch._foreach_mul(first, weights.unbind()))

    @staticmethod
    def _moved(states, key, change):
        """Changes one number of every state, all at once."""
        changed = change(torch.stack([state[key] for state in states]))
        for state, value in zip(states, changed.unbind()):
            state[key] = value
        return changed

    def state_of(self, core, group):
        state = super().state_of(core, group)
        for key in SQUARED[: 1 + group["amsgrad"]]:
            state.setdefault(key, core.new_zeros(()))
        for key in SQUARED:
            if key in state and state[key].ndim:  # of a state that torch's Adam made
                state[key] = state[key].mean()
        return state


class Adam(OneSecondMoment, torch.optim.Adam):
    pass


class AdamW(OneSecondMoment, torch.optim.AdamW):
    pass
