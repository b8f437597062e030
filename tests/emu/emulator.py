"""The device code compiled for the host (csrc/emu), as tests call it: NumPy arrays in, NumPy arrays out."""

import ctypes
import functools
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 7}  # of the threads of a block


class EmulationError(RuntimeError):
    """What the executor found wrong with a kernel: where, and what every thread was doing."""


def library_path():
    """TK_EMU_LIBRARY, or the newest one built without a sanitizer."""
    if path := os.environ.get("TK_EMU_LIBRARY"):
        return Path(path)
    found = [p for p in ROOT.glob("build/*/libtk_emu.so") if p.parent.name not in ("emu-address", "emu-thread")]
    if not found:
        raise FileNotFoundError("libtk_emu.so is not built; `make emu` builds it (CMake option TK_EMU=ON)")
    return max(found, key=lambda p: p.stat().st_mtime)


@functools.cache
def library():
    lib = ctypes.CDLL(str(library_path()))
    lib.tk_emu_take_error.restype = ctypes.c_char_p
    lib.tk_emu_sanitizer.restype = ctypes.c_char_p
    return lib


def sanitizer():
    """`address`, `thread`, or nothing."""
    return library().tk_emu_sanitizer().decode()


def set_thread_order(order):
    library().tk_emu_set_thread_order(ORDERS[order])


def check():
    """Raises what the last launches found."""
    error = library().tk_emu_take_error()
    if error is not None:
        raise EmulationError(error.decode())


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


MISTAKES = (
    *("none", "missing_barrier", "off_by_one", "overrun", "wrong_mask", "source_outside"),
    *("divergent_barrier", "early_exit", "shuffle_as_barrier", "racing_blocks"),
)


def mirror_and_sum(mistake, x):
    """csrc/emu/sample.cuh: every row of x backwards, and its sum; `mistake` as in the enumeration there."""
    rows, n = x.shape
    mirrored, total = np.empty_like(x), np.empty(rows, x.dtype)
    code = MISTAKES.index(mistake)
    library().tk_emu_sample(code, pointer(x), rows, n, pointer(mirrored), pointer(total))
    check()
    return mirrored, total
