"""The check before anything changes: gradients are finite."""

import torch

from tdlrt.expansion import NonFiniteError


def refuse_nonfinite(named_gradients, reducer):
    """Raises `NonFiniteError` naming the gradients that hold NaN or Inf; one synchronisation for all of them.

    Where gradients are kept in shards, the processes agree on it.

    A norm is far cheaper than an elementwise test and is finite only if every entry is; it may also overflow, so where
    that of all gradients together is not finite, each is looked at closely.
    """
    named = [(name, g) for name, g in named_gradients if g is not None]
    if not named:
        return
    norm = torch.nn.utils.get_total_norm([g for _, g in named])
    if reducer.sharded:
        norm = reducer.maximum(norm)
    if torch.isfinite(norm):
        return
    broken = torch.stack([~torch.isfinite(g).all() for _, g in named]).to(norm.dtype)
    if reducer.sharded:
        broken = reducer.maximum(broken)
    bad = [name for (name, _), flag in zip(named, broken.tolist()) if flag]
    if bad:
        raise NonFiniteError(f"the gradient of {', '.join(bad)} holds NaN or Inf")


def core_gradients(expansions):
    return [(f"{e.name}.core", e.layer.core.grad) for e in expansions]
