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
    lib.tk_emu_problem_bytes.restype = ctypes.c_int64
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


# csrc/kernels/problems.h, field by field: p pointer, i int32, l int64, d double.
PROBLEMS = {
    "gram": "p:a p:gram p:partial p:finished l:row l:col l:col_outer i:size i:depth i:inner i:splits "
    "i:split_depth i:first_tile",
    "project_out": "p:d p:u p:out p:work p:flag l:d_row l:d_col i:n i:r i:cols i:normalise i:passes i:first_tile",
    "triangular_product": "p:a p:b p:out p:flag l:a_row l:a_col l:out_row l:out_col i:m i:n i:first_tile i:packed "
    "i:transposed i:newton i:on_flag",
    "semidefinite_cholesky": "p:gram p:work p:inverse p:factor p:trace p:rank p:flag d:tolerance d:relative "
    "d:shift i:size i:sort i:defer i:pack i:resident",
    "jacobi_svd": "p:factor p:progress p:basis p:sigma p:trace p:rank p:flag d:bound d:shift d:tolerance i:size "
    "i:sweeps i:min_rank i:max_rank i:width i:meetings i:first_block",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "d": ctypes.c_double}
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}


@functools.cache
def problem_type(table):
    fields = [field.split(":") for field in PROBLEMS[table].split()]
    struct = type(table, (ctypes.Structure,), {"_fields_": [(name, _TYPES[kind]) for kind, name in fields]})
    for dtype in (0, 1):
        assert library().tk_emu_problem_bytes(table.encode(), dtype) == ctypes.sizeof(struct), "problems.h changed"
    return struct


def far_rows(values, path):
    """The same matrix with rows 2³⁰ elements apart, in a sparse file: from the third on, 32 bits do not reach."""
    rows, columns = values.shape
    memory = np.memmap(path, values.dtype, "w+", shape=((rows - 1) * 2**30 + columns,))
    spread = np.lib.stride_tricks.as_strided(memory, values.shape, (2**30 * values.itemsize, values.itemsize))
    spread[:] = values
    return spread


def problem(**fields):
    return fields


def launch(kernel, dtype, problems, work=0, grid=None, block=128, shared=0, table=None):
    """One launch over a list of problems; arrays go by address, fields that are left out are 0."""
    struct = problem_type(table or kernel)
    rows = (struct * len(problems))()
    for row, problem in zip(rows, problems):
        for name, value in problem.items():
            setattr(row, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
    grid = len(problems) if grid is None else grid
    shared = ctypes.c_int64(shared)
    status = library().tk_emu_launch(
        kernel.encode(), _DTYPES[np.dtype(dtype)], ctypes.byref(rows), len(problems), work, grid, block, shared
    )
    check()
    assert status == 0, f"launching {kernel} gave status {status}"


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
