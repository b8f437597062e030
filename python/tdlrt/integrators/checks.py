"""The check before anything changes: gradients are finite."""

import torch

from tdlrt.expansion import NonFiniteError


def refuse_nonfinite(named_gradients):
    """Raises `NonFiniteError` naming the gradients that hold NaN or Inf; one synchronisation for all of them."""
    named = [(name, g) for name, g in named_gradients if g is not None]
    if not named:
        return
    finite = torch.stack([torch.isfinite(g).all() for _, g in named]).tolist()
    bad = [name for (name, _), ok in zip(named, finite) if not ok]
    if bad:
        raise NonFiniteError(f"the gradient of {', '.join(bad)} holds NaN or Inf")


def core_gradients(expansions):
    return [(f"{e.name}.core", e.layer.core.grad) for e in expansions]
