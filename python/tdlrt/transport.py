"""Carries a core, and the optimiser state that belongs to it, through a change of bases.

A core (and a momentum, which is linear in gradients) lives in the coordinates of the factors: bases that grow from U to
[U|V] pad it with zeros, and bases that shrink to [U|V]P multiply it by Pᵀ in each mode. A second moment is not linear;
it is multiplied by (P∘P)ᵀ, which keeps it non-negative.
"""

import torch

from tucker_kernels.library import call, ops

# State of torch.optim's optimisers, by what happens to it when P mixes coordinates.
LINEAR = ("momentum_buffer", "exp_avg")
SQUARED = ("exp_avg_sq", "max_exp_avg_sq")


def pad(tensor, shape):
    """The tensor in the leading corner of zeros of the given shape."""
    sizes = zip(reversed(tensor.shape), reversed(shape))  # as torch pads, the last dimension first
    return torch.nn.functional.pad(tensor, [n for old, new in sizes for n in (0, new - old)])


def corner(shape):
    """Index of the leading corner of a tensor."""
    return tuple(map(slice, shape))


def by_dtype(tensors):
    """Indices grouped by dtype and device: one call of an operator each (one group in nearly every model)."""
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    return [[i for i, kind in enumerate(kinds) if kind == chosen] for chosen in dict.fromkeys(kinds)]


def products(tensors, matrices, modes, transpose=False):
    """tensors[i] ×_{modes[i][0]} matrices[i][0] ×_{modes[i][1]} …, all in one call."""
    found = [None] * len(tensors)
    for group in by_dtype(tensors):
        operands = [tensors[i] for i in group]
        flat = [[x for i in group for x in lists[i]] for lists in (matrices, modes)]
        results = call(
            ops.grouped_mode_dot.default, operands, flat[0], [len(modes[i]) for i in group], flat[1], transpose
        )
        for i, result in zip(group, results):
            found[i] = result
    return found


def cross_grams(a, b, modes):
    """Contractions of a[i] with b[i] over every mode but modes[i], all in one call."""
    found = [None] * len(a)
    for group in by_dtype(a):
        lists = [[values[i] for i in group] for values in (a, b, modes)]
        for i, result in zip(group, call(ops.grouped_cross_gram.default, *lists)):
            found[i] = result
    return found


def moving_entries(state, shape):
    """[(key, whether it is linear)] of the tensors in the state of one parameter that move with its bases.

    Raises ValueError for others, also of rows or columns as Adafactor's.
    """
    found = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim > 0}
    keys = [k for k, v in found.items() if v.shape == shape or v.numel() > 1]
    for key in keys:
        if found[key].shape != shape or key not in LINEAR + SQUARED:
            raise ValueError(
                f"base keeps {key!r} per entry, row or column, and how that moves with the bases is not known; "
                f"known are {', '.join(LINEAR + SQUARED)}"
            )
    return [(key, key in LINEAR) for key in keys]


def check_shapes(name, core, state):
    """Raises ValueError where the state of a core is of other ranks, as one that was loaded without its model is."""
    for key in LINEAR + SQUARED:
        value = state.get(key)
        whole = key in SQUARED and value is not None and value.ndim == 0  # one second moment (`adam.py`)
        if value is not None and not whole and value.shape != core.shape:
            raise ValueError(
                f"the optimiser's state of {name}.core has ranks {tuple(value.shape)}, the core {tuple(core.shape)}: "
                "load the model that belongs to it, too"
            )


def follow_dtype(parameter, state):
    """Casts what a parameter's state keeps per entry to the dtype that the parameter has now."""
    kept = next((state[key] for key in LINEAR if state.get(key) is not None), None)
    if kept is None or kept.dtype == parameter.dtype:
        return
    for key, value in state.items():
        if isinstance(value, list):  # momentum outside the bases
            state[key] = [None if m is None else m.to(parameter.dtype) for m in value]
        elif key in LINEAR + SQUARED and value is not None:
            state[key] = value.to(parameter.dtype)


def _copied(state, moved):
    """The state with its entries in `moved` replaced; others are cloned, since a step counter is updated in place and
    a step may be taken back."""
    return {k: moved[k] if k in moved else v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def pad_state(state, old_shape, new_shape):
    """The state of a core whose bases grow: what moves with them, padded with zeros."""
    return _copied(state, {key: pad(state[key], new_shape) for key, _ in moving_entries(state, old_shape)})


def project_states(moving, momenta=()):
    """(states in the coordinates of [U|V]P from those of [U|V], momenta of factors likewise); all in one call.

    moving: [(state, shape of its core, a P or None per mode)]; momenta: [(m in the coordinates of U, P)].
    """
    places, tensors, matrices, modes = [], [], [], []
    moved = [{} for _ in moving]
    for new, (state, shape, projections) in zip(moved, moving):
        cut = [i for i, p in enumerate(projections) if p is not None]
        for key, linear in moving_entries(state, shape):
            if not cut:
                new[key] = state[key].clone()
                continue
            places.append((new, key))
            tensors.append(state[key])
            matrices.append([projections[i] if linear else projections[i] ** 2 for i in cut])
            modes.append(cut)
    tensors += [m for m, _ in momenta]
    matrices += [[P[: m.shape[1]]] for m, P in momenta]
    results = products(tensors, matrices, modes + [[1]] * len(momenta), transpose=True)
    for (new, key), result in zip(places, results):
        new[key] = result
    return [_copied(state, new) for new, (state, _, _) in zip(moved, moving)], results[len(places) :]
