"""Second stage of every split reduction here: the partial sums of all splits, added in ascending order.

    out[j, tap] = Σ_s partial[s, tap, j]

Layout   partial (S, taps, E) float32, contiguous; out (E, taps): the window becomes the fastest, as in a core.
Numerics fp32, one accumulator per element, splits in order: deterministic. Rounded once to the dtype of `out`.
"""

import torch
import triton
import triton.language as tl

from tucker_kernels.triton.launch import launch

BLOCK = 256


@triton.jit
def _ordered_sum(partial, out, S, TAPS, E, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = E * TAPS
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(0, S):
        acc += tl.load(partial + tl.cast(s, tl.int64) * total + i, mask=i < total, other=0.0)
    tl.store(out + (i % E) * TAPS + i // E, acc.to(out.dtype.element_ty), mask=i < total)


def ordered_sum(partial, dtype):
    """Sums (S, taps, *shape) float32 over S; returns (*shape, taps) in `dtype`."""
    splits, taps, *shape = partial.shape
    out = torch.empty((*shape, taps), dtype=dtype, device=partial.device)
    if out.numel():
        elements = out.numel() // taps
        launch(
            _ordered_sum, (triton.cdiv(out.numel(), BLOCK),), partial, partial, out, splits, taps, elements, BLOCK=BLOCK
        )  # fmt: skip
    return out
