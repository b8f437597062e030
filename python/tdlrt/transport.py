"""Carries a core, and the optimiser state that belongs to it, through a change of bases.

A core (and a momentum, which is linear in gradients) lives in the coordinates of the factors: bases that grow from U to
[U|V] pad it with zeros, and bases that shrink to [U|V]P multiply it by Pᵀ in each mode. A second moment is not linear;
it is multiplied by (P∘P)ᵀ, which keeps it non-negative.
"""

import torch

import tucker_kernels as tk

# State of torch.optim's optimisers, by what happens to it when P mixes coordinates.
LINEAR = ("momentum_buffer", "exp_avg")
SQUARED = ("exp_avg_sq", "max_exp_avg_sq")


def pad(tensor, shape):
    """The tensor in the leading corner of zeros of the given shape."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor.clone()
    padded = tensor.new_zeros(shape)
    padded[corner(tensor.shape)] = tensor
    return padded


def corner(shape):
    """Index of the leading corner of a tensor."""
    return tuple(slice(0, n) for n in shape)


def by_dtype(tensors):
    """Indices grouped by dtype and device: one call of an operator each (one group in nearly every model)."""
    groups = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.device), []).append(i)
    return groups.values()


def map_state(state, shape, linear, squared):
    """The state of one parameter with its tensors of the parameter's shape mapped; everything else copied."""
    mapped = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == shape and value.ndim > 0:
            if key not in LINEAR and key not in SQUARED:
                raise ValueError(
                    f"base keeps {key!r} per entry, and how that moves with the bases is not known; known are "
                    f"{', '.join(LINEAR + SQUARED)}"
                )
            value = (linear if key in LINEAR else squared)(value)
        elif isinstance(value, torch.Tensor):
            value = value.clone()  # step counters are updated in place, and a step may be taken back
        mapped[key] = value
    return mapped


def pad_state(state, old_shape, new_shape):
    def grow(tensor):
        return pad(tensor, new_shape)

    return map_state(state, old_shape, grow, grow)


def project_state(state, shape, projections):
    """State in the coordinates of [U|V]P, from that of [U|V]; `projections` has a P or None per mode."""

    def linear(tensor):
        return tk.multi_mode_dot(tensor, projections, transpose=True)

    def squared(tensor):
        return tk.multi_mode_dot(tensor, [None if p is None else p * p for p in projections], transpose=True)

    return map_state(state, shape, linear, squared)
