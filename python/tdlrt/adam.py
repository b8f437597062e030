"""Adam and AdamW with one second moment for a whole core.

A core is kept in bases that every step turns, so that its entries have no identity for a second moment of their own to
remember, and a direction that has just come in has none at all. One number for all of them, the mean of their squares,

    v ← β₂ v + (1 − β₂) ‖∇_C L‖² / (entries of C),

is the same in all bases, and dividing by its root keeps the step along the momentum, which can then be carried in
tangent directions outside the bases as that of SGD is (`momentum.py`). Everything else is torch's, for the other
parameters too; a core's state has torch's keys, the second moments without dimensions.
"""

from collections.abc import Mapping, Set
from types import MappingProxyType

import torch

from tdlrt.transport import SQUARED, by_dtype


class OneSecondMoment:
    """For `torch.optim.Adam` and `AdamW`.

    cores: the parameters that have one second moment. entries: {core: how many of its entries are in use, on its
    device}, of those where not all are.
    """

    cores: Set[torch.Tensor] = frozenset()
    entries: Mapping[torch.Tensor, torch.Tensor] = MappingProxyType({})

    def step(self, closure=None):
        taken = [
            (group, [(p, p.grad) for p in group["params"] if p in self.cores and p.grad is not None])
            for group in self.param_groups
        ]
        for _, pairs in taken:
            for core, _ in pairs:
                core.grad = None  # torch is not to step it
        loss = super().step(closure)
        with torch.no_grad():
            for group, pairs in taken:
                for core, gradient in pairs:
                    core.grad = gradient
                for members in by_dtype([core for core, _ in pairs]):
                    self._step_cores(group, [pairs[i] for i in members])
        return loss

    def _step_cores(self, group, pairs):
        """torch's arithmetic with v for the whole core; nothing is read from the device."""
        cores, gradients = map(list, zip(*pairs))
        states = [self._state_of(core, group) for core in cores]
        lr, (beta1, beta2), eps, decay = (group[key] for key in ("lr", "betas", "eps", "weight_decay"))
        if group["maximize"]:
            gradients = torch._foreach_neg(gradients)
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(cores, 1 - lr * decay)
        elif decay:
            gradients = torch._foreach_add(gradients, cores, alpha=decay)
        first = [state["exp_avg"] for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        norms = torch._foreach_norm(gradients)
        entries = [self.entries.get(core, core.numel()) for core in cores]
        squares = torch.stack([norm**2 / n for norm, n in zip(norms, entries)])
        second = self._moved(states, "exp_avg_sq", lambda before: torch.lerp(before, squares, 1 - beta2))
        if group["amsgrad"]:
            second = self._moved(states, "max_exp_avg_sq", lambda before: torch.maximum(before, second))
        for state in states:
            state["step"] += 1
        steps = torch.stack([state["step"] for state in states]).to(second)
        sizes = (second / (1 - beta2**steps)).sqrt() + eps
        weights = -lr / (1 - beta1**steps) / sizes
        torch._foreach_add_(cores, torch._foreach_mul(first, weights.unbind()))

    @staticmethod
    def _moved(states, key, change):
        """Changes one number of every state, all at once."""
        changed = change(torch.stack([state[key] for state in states]))
        for state, value in zip(states, changed.unbind()):
            state[key] = value
        return changed

    def _state_of(self, core, group):
        state = self.state[core]
        if "exp_avg" not in state:
            on_host = not (group["capturable"] or group["fused"])
            state["step"] = torch.zeros((), device="cpu" if on_host else core.device)
            state["exp_avg"] = torch.zeros_like(core)
            state["exp_avg_sq"] = core.new_zeros(())
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = core.new_zeros(())
        for key in SQUARED:
            if key in state and state[key].ndim:  # of a state that torch's Adam made
                state[key] = state[key].mean()
        return state


class Adam(OneSecondMoment, torch.optim.Adam):
    pass


class AdamW(OneSecondMoment, torch.optim.AdamW):
    pass
