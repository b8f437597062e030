"""Triton's interpreter made strict and right: import this before anything that imports triton.

- bfloat16: its `tl.dot` multiplies bit patterns as integers and its float32 → bfloat16 cast truncates; both replaced.
- Addresses: every address that a load or store touches under its mask must lie inside a tensor of the launch; the first
  that does not raises `InterpreterError` at its line. Untouched, the interpreter reads and writes the heap there.
- Counting: `counted()` collects operations and bytes of the launches inside it, for the cost table.
- `last_program_only()` runs one program of a launch, for tensors too large to walk.
"""

import contextlib
import dataclasses
import os

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before the process starts"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402, F401 - for tests

_Builder, _Executor, _Handle = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.TensorHandle


def _widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@dataclasses.dataclass
class Count:
    """What the programs of some launches did: operations in dots, and bytes under the masks."""

    flops: int = 0
    requested: int = 0  # bytes loaded, each load counted
    loads: list = dataclasses.field(default_factory=list)
    stores: list = dataclasses.field(default_factory=list)

    @staticmethod
    def _unique(parts):
        total = 0
        for size in {size for _, size in parts}:
            total += size * len(np.unique(np.concatenate([a for a, s in parts if s == size])))
        return total

    @property
    def read(self):
        """Bytes loaded, each address once."""
        return self._unique(self.loads)

    @property
    def written(self):
        return self._unique(self.stores)

    @property
    def stored(self):
        """Bytes stored, each store counted: more than `written` where two programs write one element."""
        return sum(len(a) * size for a, size in self.stores)


_extents = np.zeros((0, 2), np.uint64)  # [start, end) of what the running launch may touch, sorted and disjoint
_count = None
_last_only = False


@contextlib.contextmanager
def counted():
    global _count
    _count = Count()
    try:
        yield _count
    finally:
        _count = None


@contextlib.contextmanager
def last_program_only():
    global _last_only
    _last_only = True
    try:
        yield
    finally:
        _last_only = False


def _extent(tensor):
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _merged(extents):
    merged = []
    for start, end in sorted(extents):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return np.array(merged, np.uint64).reshape(-1, 2)


def _check(pointers, mask, kind):
    size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.uint64)
    place = np.searchsorted(_extents[:, 0], addresses, side="right").astype(np.int64) - 1
    inside = (place >= 0) & (addresses + size <= _extents[np.maximum(place, 0), 1])
    if not inside.all():
        wrong = addresses[~inside]
        raise IndexError(f"{kind} of {len(wrong)} elements outside every tensor of the launch, first {wrong[0]:#x}")
    if _count is not None:
        (_count.loads if kind == "load" else _count.stores).append((addresses, int(size)))
        if kind == "load":
            _count.requested += len(addresses) * int(size)


_dot, _load, _store = _Builder.create_dot, _Builder.create_masked_load, _Builder.create_masked_store
_cast, _set_grid_idx, _call = _Builder.create_fp_trunc, _Builder.set_grid_idx, _Executor.__call__


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if _count is not None:
        _count.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    wide = [_Handle(_widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
    return _dot(self, *wide, d, input_precision, max_num_imprecise_acc)


def create_fp_trunc(self, src, dst_type):
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return _Handle(_round_to_bfloat16(src.data), tl.bfloat16)
    return _cast(self, src, dst_type)


def create_masked_load(self, ptrs, mask, other, *rest):
    _check(ptrs, mask, "load")
    return _load(self, ptrs, mask, other, *rest)


def create_masked_store(self, ptrs, value, mask, *rest):
    _check(ptrs, mask, "store")
    return _store(self, ptrs, value, mask, *rest)


def call(self, *args, **kwargs):
    global _extents
    before, grid = _extents, self.grid
    _extents = _merged(_extent(a) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.numel())
    try:
        if _last_only:
            last = tuple(n - 1 for n in (*grid, 1, 1)[:3])
            self.grid = (1, 1, 1)
            _Builder.set_grid_idx = lambda builder, *_: setattr(builder, "grid_idx", last)
        return _call(self, *args, **kwargs)
    finally:
        _extents, self.grid, _Builder.set_grid_idx = before, grid, _set_grid_idx


_Builder.create_dot, _Builder.create_fp_trunc = create_dot, create_fp_trunc
_Builder.create_masked_load, _Builder.create_masked_store = create_masked_load, create_masked_store
_Executor.__call__ = call
# The tensors are on the CPU already; the copy back would be onto itself.
_Executor._restore_args_dev = lambda *_: None
