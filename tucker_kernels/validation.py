"""Argument checks of the public functions: each error names the argument, what was given and what is allowed."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)
INTEGER = (int, np.integer, torch.SymInt)  # sizes are symbolic while torch traces
NUMBERS = (int, float, np.integer, np.floating)


def _names(dtypes):
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def shown(value):
    """A value as errors name it: a tensor or an array would fill lines."""
    return type(value).__name__ if isinstance(value, (torch.Tensor, np.ndarray)) else repr(value)


def _plain(value):
    """numpy's integers as Python's, which operators want."""
    return int(value) if isinstance(value, np.integer) else value


def tensor(name, value, dtypes=FLOATING, ndim=None, like=None):
    """A dense tensor of an allowed dtype with `ndim` dimensions; dtype and device as `like`, a (name, tensor)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "is nested" if value.is_nested else f"has layout {value.layout}"
        raise TypeError(f"{name} {kind}; allowed are dense tensors")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are {_names(dtypes)}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s'[: ndim != 1]}, got shape {tuple(value.shape)}")
    if like is not None:
        other_name, other = like
        if value.dtype != other.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, but {other_name} has {other.dtype}")
        if value.device != other.device:
            raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")
    return value


def integer(name, value, low, high, of=""):
    """An integer from `low` to `high`; `of` says what those depend on."""
    if isinstance(value, bool) or not isinstance(value, INTEGER):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed are {low} to {high}{of}")
    return _plain(value)


def at_least(name, value, least):
    """An integer from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        kind = ValueError if isinstance(value, Integral) and not isinstance(value, bool) else TypeError
        raise kind(f"{name} is {shown(value)}; allowed are integers from {least} on")
    return _plain(value)


def number(name, value, allowed, accepted):
    """A real number that `accepted` says yes to; `allowed` says the same in words."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {shown(value)}; allowed are {allowed}")
    if not accepted(value):
        raise ValueError(f"{name} is {value}; allowed are {allowed}")
    return value


def flag(name, value):
    """True or False, which is returned."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def mode(name, value, ndim):
    """An integer mode in [−ndim, ndim), returned in [0, ndim)."""
    if ndim == 0:
        raise ValueError(f"{name} is {value}, but there are no dimensions")
    return integer(name, value, -ndim, ndim - 1) % ndim


def _is_sequence(values):
    if isinstance(values, (list, tuple)):  # asked first: `Iterable` asks in Python
        return True
    return isinstance(values, Iterable) and not isinstance(values, (str, bytes, torch.Tensor))


def integers(name: str, values: Any, minimum: int | None = None) -> list[int]:
    """A sequence of integers, each at least `minimum`, as a list."""
    if not _is_sequence(values):
        raise TypeError(f"{name} must be a sequence of integers, got {type(values).__name__}")
    found = list(values)
    for v in found:
        if isinstance(v, bool) or not isinstance(v, INTEGER):
            raise TypeError(f"{name} must hold integers, got {shown(v)}")
        if minimum is not None and v < minimum:
            raise ValueError(f"{name} is {tuple(found)}; allowed are integers from {minimum} on")
    return [_plain(v) for v in found]


def per_dimension(name: str, value: Any, count: int, minimum: int) -> list:
    """An integer or `count` of them, each at least `minimum`, as a list."""
    if isinstance(value, INTEGER) and not isinstance(value, bool):
        if value < minimum:
            raise ValueError(f"{name} is {value}; allowed are integers from {minimum} on")
        return [_plain(value)] * count
    if not _is_sequence(value):
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {type(value).__name__}")
    values = integers(name, value, minimum)
    if len(values) != count:
        raise ValueError(f"{name} must be one integer or {count}, got {tuple(values)}")
    return values


def matrix_for_mode(name, value, tensor_, mode_, transpose, like):
    """A matrix whose columns (rows when transposed) match mode `mode_` of `tensor_`."""
    tensor(name, value, ndim=2, like=like)
    flag("transpose", transpose)
    size = value.shape[0] if transpose else value.shape[1]
    if size != tensor_.shape[mode_]:
        side = "rows" if transpose else "columns"
        raise ValueError(f"{name} has {size} {side}, but mode {mode_} of {like[0]} has size {tensor_.shape[mode_]}")


def sequence(name: str, values: Any, of: str = "matrices") -> list:
    """A list or tuple, as a list; a tensor is refused, because it would be taken apart by rows."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of {of}, got {type(values).__name__}")
    return list(values)


def matrices(name, values, dtypes=FULL):
    """A non-empty list of matrices of one dtype on one device."""
    values = sequence(name, values)
    if not values:
        raise ValueError(f"{name} is empty; at least one matrix is needed")
    for i, value in enumerate(values):
        like = (f"{name}[0]", values[0]) if i else None
        tensor(f"{name}[{i}]", value, dtypes, ndim=2, like=like)
    return values


def bases(name, values, sizes, like):
    """A list of matrices or `None`, one per mode; `sizes` has for each its rows and what these must agree with."""
    for i, (value, (size, what)) in enumerate(zip(values, sizes)):
        if value is not None:
            tensor(f"{name}[{i}]", value, ndim=2, like=like)
            if value.shape[0] != size:
                raise ValueError(f"{name}[{i}] has {value.shape[0]} rows, but {what}")


def tolerances(name, value, count):
    """A finite number from 0 on, or one per core, as a list of floats."""
    if isinstance(value, bool) or not isinstance(value, (*NUMBERS, list, tuple)):
        raise TypeError(f"{name} must be a number or one per core, got {type(value).__name__}")
    values = [value] * count if isinstance(value, NUMBERS) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, but there are {count} cores")
    for v in values:
        if isinstance(v, bool) or not isinstance(v, NUMBERS):
            raise TypeError(f"{name} must hold numbers, got {shown(v)}")
        if not 0 <= v < math.inf:
            raise ValueError(f"{name} is {value}; allowed are finite numbers from 0 on")
    return [float(v) for v in values]


def choice(name, value, allowed):
    """One of a few texts (or None, where that is among them), which is returned."""
    if isinstance(value, (str, type(None))) and value in allowed:
        return value
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} is {shown(value)}; allowed are {', '.join(map(repr, allowed))}")
