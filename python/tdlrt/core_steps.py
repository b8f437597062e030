"""Optimisers that step cores by a rule of their own, and everything else as the optimiser of torch they are made from.

A core is kept in bases that every step turns, so its entries have no identity that a rule by entry could go by; these
rules see the weight alone. All keep a first moment, m ← β₁ m + (1 − β₁) ∇_C L, which is carried in tangent directions
outside the bases as SGD's momentum is (`momentum.py`).
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from tdlrt.layers import TuckerLayer
from tdlrt.transport import by_dtype


class CoreSteps:
    """Goes before `torch.optim.Adam` or `AdamW` among the bases of a class.

    The class has `move(group, cores, gradients, states)`, which changes cores of one dtype by their descent directions
    `gradients` and their states, whose first moments have these already.

    cores: {parameter that has the rule: its layer}.
    """

    cores: Mapping[torch.Tensor, TuckerLayer] = MappingProxyType({})

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        taken = [
            (group, [(p, p.grad) for p in group["params"] if p in self.cores and p.grad is not None])
            for group in self.param_groups
        ]
        for _, pairs in taken:
            for core, _ in pairs:
                core.grad = None  # torch is not to step it
        super().step()
        with torch.no_grad():
            for group, pairs in taken:
                for core, gradient in pairs:
                    core.grad = gradient
                for members in by_dtype([core for core, _ in pairs]):
                    self._step_cores(group, [pairs[i] for i in members])
        return loss

    def _step_cores(self, group, pairs):
        """torch's arithmetic up to the first moment; nothing is read from the device."""
        cores, gradients = map(list, zip(*pairs))
        states = [self.state_of(core, group) for core in cores]
        lr, decay = group["lr"], group["weight_decay"]
        if group["maximize"]:
            gradients = torch._foreach_neg(gradients)
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(cores, 1 - lr * decay)
        elif decay:
            gradients = torch._foreach_add(gradients, cores, alpha=decay)
        torch._foreach_lerp_([state["exp_avg"] for state in states], gradients, 1 - group["betas"][0])
        for state in states:
            state["step"] += 1
        self.move(group, cores, gradients, states)

    def state_of(self, core, group):
        """The state of a core, with torch's keys; made where there is none yet."""
        state = self.state[core]
        if "exp_avg" not in state:
            on_host = not (group["capturable"] or group["fused"])
            state["step"] = torch.zeros((), device="cpu" if on_host else core.device)
            state["exp_avg"] = torch.zeros_like(core)
        return state
