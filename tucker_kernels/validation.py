"""Argument checks of the public functions: each error names the argument, what was given and what is allowed."""

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name, value, dtypes=FLOATING, ndim=None, like=None):
    """A tensor of an allowed dtype with `ndim` (one of `ndim`) dimensions; dtype and device as `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are {_names(dtypes)}")
    if ndim is not None and value.ndim not in ((ndim,) if isinstance(ndim, int) else ndim):
        raise ValueError(f"{name} must have {_either(ndim)} dimensions, got shape {tuple(value.shape)}")
    if like is not None:
        other_name, other = like
        if value.dtype != other.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, but {other_name} has {other.dtype}")
        if value.device != other.device:
            raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")
    return value


def _either(ndim):
    return str(ndim) if isinstance(ndim, int) else " or ".join(map(str, ndim))


def mode(name, value, ndim):
    """An integer mode in [−ndim, ndim), returned in [0, ndim)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not -ndim <= value < ndim:
        raise ValueError(f"{name} is {value}; allowed are {-ndim} to {ndim - 1} for {ndim} dimensions")
    return value % ndim


def matrix_for_mode(name, value, tensor_, mode_, transpose, like):
    """A matrix whose columns (rows when transposed) match mode `mode_` of `tensor_`."""
    tensor(name, value, ndim=2, like=like)
    size = value.shape[0] if transpose else value.shape[1]
    if size != tensor_.shape[mode_]:
        side = "rows" if transpose else "columns"
        raise ValueError(f"{name} has {size} {side}, but mode {mode_} of {like[0]} has size {tensor_.shape[mode_]}")


def matrices(name, values, dtypes=FULL):
    """A non-empty list of matrices of one dtype on one device."""
    if isinstance(values, torch.Tensor) or not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of matrices, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} is empty; at least one matrix is needed")
    for i, value in enumerate(values):
        like = (f"{name}[0]", values[0]) if i else None
        tensor(f"{name}[{i}]", value, dtypes, ndim=2, like=like)
    return list(values)


def per_dimension(name, value, count, minimum):
    """An int or `count` ints, each at least `minimum`, as a list."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be one integer or {count}, got {tuple(values)}")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            raise TypeError(f"{name} must hold integers, got {v!r}")
        if v < minimum:
            raise ValueError(f"{name} is {value}; allowed are integers from {minimum} on")
    return values


def choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
    return value
