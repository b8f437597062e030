"""What every launcher needs: the device guard, the precision of float32 products, and when offsets need 64 bits."""

import contextlib
import math

import torch

from tucker_kernels.triton.configs import default_kind
from tucker_kernels.validation import choice

PRECISIONS = ("tf32x3", "ieee", "tf32")


def dtype_kind(dtype, largest_rank, input_precision=None):
    """The row of the configuration table: "half" for the 16-bit dtypes, else the precision of float32 products."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    if dtype != torch.float32:
        raise TypeError(f"dtype is {dtype}; the Triton kernels take bfloat16, float16 and float32")
    if input_precision is None:
        return default_kind(largest_rank)
    return choice("input_precision", input_precision, PRECISIONS)


def precision(kind):
    """`input_precision` of tl.dot; it says nothing about 16-bit operands, whose products are exact in float32."""
    return "ieee" if kind == "half" else kind


def alignment(*sizes):
    """The largest power of two up to 16 that divides all channel counts.

    Kernels get the counts divided by it and multiply again, so that the compiler sees how rows are aligned; by itself
    it looks for multiples of 16 only, and ranks are often multiples of 8.
    """
    return math.gcd(16, *sizes)


def needs_wide(*tensors):
    """Whether an element offset can exceed 31 bits."""
    return any(t.numel() >= 2**31 for t in tensors)


def launch(kernel, grid, like, *args, **options):
    """Launches on the device of `like`, whichever device is current."""
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options)
