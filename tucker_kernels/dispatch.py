"""The back ends: which there are, which can run here and why not, and which one an operator call goes to.

An operator's schema (`library.py`) is one; its implementations are several, kept in one table here. A call goes to
the first back end in the device's order that implements the operator. `use_backend` puts one in front.
"""

import functools
import logging
import os
from collections.abc import Callable

import torch

from tucker_kernels.native import native_module

NAMES = ("reference", "cpu", "cuda", "triton")
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# Triton's interpreter, for tests, runs its kernels on CPU tensors; only where it is asked for (`use_backend`).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
}

log = logging.getLogger("tucker_kernels")

_implementations: dict[str, dict[str, Callable]] = {name: {} for name in NAMES}
_predicates: dict[tuple[str, str], Callable[..., str]] = {}
_preferred: str | None = None


def implements(backend: str, operator: str | None = None, can_run: Callable[..., str] | None = None):
    """Decorator: this function is `backend`'s implementation of the operator of the same name.

    `can_run`, given the call's arguments, says why this back end cannot take them: an empty string where it can. The
    reason is logged and the next back end is asked.
    """

    def register(function):
        name = operator or function.__name__
        _implementations[backend][name] = function
        if can_run is not None:
            _predicates[backend, name] = can_run
        return function

    return register


def backends() -> dict[str, tuple[bool, str]]:
    """Every back end by name: whether it can run here, and why (or why not).

    >>> backends()["reference"]
    (True, 'plain torch operations, on any device')
    """
    return {
        "reference": (True, "plain torch operations, on any device"),
        "cpu": _cpu_status(),
        "cuda": _cuda_status(),
        "triton": _triton_status(),
    }


def _cpu_status():
    module, reason = native_module()
    if module is None:
        return False, reason
    return True, f"compiled kernels for {module.cpu_isa()}"


def _cuda_status():
    module, reason = native_module()
    if module is None:
        return False, reason
    if not hasattr(module, "cuda_architectures"):
        return False, f"this build has no CUDA kernels ({module.cuda_decision})"
    available, reason = _torch_cuda_status(f"compiled kernels for {module.cuda_architectures()}")
    if available and (problem := module.cuda_unusable()):
        major, minor = torch.cuda.get_device_capability()
        return False, f"{reason} (compute capability {major}.{minor}): {problem}"
    return available, reason


def _triton_status():
    try:
        import triton
        import triton.language  # a folder that happens to be called triton has none
    except ImportError:
        return False, "triton is not installed; `pip install tucker-kernels[triton]`"
    found = f"triton {triton.__version__}"
    if INTERPRETED:
        return True, f"{found} interpreted on the CPU (TRITON_INTERPRET=1), for tests"
    available, reason = _torch_cuda_status(found)
    if available and torch.cuda.get_device_capability() < (8, 0):
        return False, f"{reason}, whose compute capability is below 8.0"
    return available, reason


def _torch_cuda_status(found: str):
    if torch.version.cuda is None:
        return False, f"{found}, but torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return False, f"{found}, but torch sees no CUDA device"
    return True, f"{found} on {torch.cuda.get_device_name()}"


class use_backend:  # noqa: N801 - reads as a function, and is one
    """Prefers one back end, from the call on or inside a `with` block.

    Operators that the back end does not implement go on by the device's own order (Triton implements only the
    large, data-sized ones). The preference is one per process, so backward passes run on other threads see it too.
    `None` takes the preference back.

    Raises:
        ValueError: `name` is not a back end, or that back end cannot run here; the message says why.
        TypeError: `name` is neither a text nor None.
    """

    def __init__(self, name: str | None):
        global _preferred
        if name is not None:
            if not isinstance(name, str) or name not in NAMES:
                kind, got = (ValueError, repr(name)) if isinstance(name, str) else (TypeError, type(name).__name__)
                raise kind(f"name must be one of {', '.join(NAMES)} or None, got {got}")
            available, reason = backends()[name]
            if not available:
                raise ValueError(f"name: back end {name!r} cannot run here: {reason}")
        self._previous, _preferred = _preferred, name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *_: object) -> None:
        global _preferred
        _preferred = self._previous


def chosen(operator: str, device: str, args: tuple | None = None) -> str:
    """The back end a call of `operator` on tensors of this device type goes to; `args` are the call's arguments."""
    if device not in ORDER:
        raise ValueError(f"device: tensors on {device!r} are not supported; allowed are cpu and cuda")
    order = ORDER[device]
    if _preferred is not None and device in DEVICES[_preferred]:
        order = (_preferred, *order)
    for name in order:
        if operator in _implementations[name] and _usable(name) and _accepts(name, operator, args):
            return name
    raise RuntimeError(f"no back end implements {operator} on {device}")


def _accepts(name, operator, args):
    can_run = _predicates.get((name, operator))
    if can_run is None or args is None:
        return True
    reason = can_run(*args)
    if reason:
        _log_refusal(name, operator, reason)
    return not reason


@functools.cache  # each reason once
def _log_refusal(name, operator, reason):
    log.info("%s does not go to back end %s: %s", operator, name, reason)


@functools.cache
def _usable(name: str) -> bool:
    """Asked once per process, and where the answer is no, the warning says why another back end runs instead."""
    available, reason = backends()[name]
    if not available:
        log.warning("back end %s is not used: %s", name, reason)
    return available


def implementation(operator: str, device: str, args: tuple | None = None) -> Callable:
    """The function of the back end that `chosen` names."""
    return _implementations[chosen(operator, device, args)][operator]
