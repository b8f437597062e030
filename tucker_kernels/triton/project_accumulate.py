"""Projection onto a basis and accumulation of that basis' gradient, in one read of the large operand.

    D[p,r] = Σ_n A[p,n] B[n,r]          G[n,s] = Σ_p A[p,n] T[p,s]

With A = dY, B = U_out, T = the saved intermediate: dT2 = dY U_out and δU_out = dYᵀ T2. With A = X, B = U_in, T = dz:
the recomputed Z = X U_in and δU_in = Xᵀ dz. The accumulation alone is the same kernel; the projection alone is the
library's.

Layout   A (P, N), B (N, R), T (P, S), D (P, R), G (N, S), row-major; A, T and D are channels-last images.
Tiling   One program: a run of pixels, BM at a time, and NP ≥ N columns of A (a block of them when only accumulating).
         A's tile (BM × NP) is read once into shared memory and multiplied from both sides; G's NP·SP ≤ 32,768 sums stay
         in registers over the run. Where they do not fit (`configs.py`) the halves go separately: the projection to the
         library's product, the accumulation here in column blocks.
Numerics fp32 accumulators. Partial G per run in a workspace, added in order by `ordered_sum`: the runs depend on the
         shape alone, so results are deterministic and the same on every device.
"""

import torch
import triton
import triton.language as tl

from tucker_kernels.triton import configs
from tucker_kernels.triton.launch import alignment, dtype_kind, launch, needs_wide, precision
from tucker_kernels.triton.ordered_sum import ordered_sum


@triton.jit
def _project_accumulate(
    a, basis, other, d, partial, P, N, R, S, TILES,
    BM: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr,
    PROJECT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N, R, S = N * ALIGN, R * ALIGN, S * ALIGN
    split = tl.program_id(0)
    n = tl.program_id(1) * NP + tl.arange(0, NP)
    r, s = tl.arange(0, RP), tl.arange(0, SP)
    if PROJECT:
        b = tl.load(basis + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
    g = tl.zeros((NP, SP), dtype=tl.float32)
    for i in range(0, TILES):
        m = (split * TILES + i) * BM + tl.arange(0, BM)
        live = m < P
        row = m
        if WIDE:
            row = m.to(tl.int64)
        x = tl.load(a + row[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        if PROJECT:
            q = tl.dot(x, b, input_precision=PRECISION)
            tl.store(d + row[:, None] * R + r[None, :], q.to(d.dtype.element_ty), mask=live[:, None] & (r < R)[None, :])
        o = tl.load(other + row[:, None] * S + s[None, :], mask=live[:, None] & (s < S)[None, :], other=0.0)
        g = tl.dot(tl.trans(x), o, g, input_precision=PRECISION)
    out = partial + (tl.cast(split, tl.int64) * N + n[:, None]) * S + s[None, :]
    tl.store(out, g, mask=(n < N)[:, None] & (s < S)[None, :])


def project_accumulate(a, basis=None, other=None, *, input_precision=None, config=None):
    """(A B, Aᵀ T) of the matrices A (P, N), B (N, R) and T (P, S); None for what is not asked.

    Args:
        a: (P, N), contiguous; bfloat16, float16 or float32.
        basis: (N, R) or None; other: (P, S) or None. R, S ≤ 256.
        input_precision: for float32, "tf32x3" (default), "ieee" or "tf32".
        config: tile sizes instead of the table's, for tests and benchmarks.

    Returns: (D (P, R) or None, G (N, S) or None), in the dtype of `a`.
    """
    P, N = a.shape
    R = basis.shape[1] if basis is not None else 0
    S = other.shape[1] if other is not None else 0
    if other is None:
        return a @ basis, None
    kind = dtype_kind(a.dtype, max(R, S), input_precision)
    config = config or (configs.project_accumulate(kind, N, max(R, S)) if basis is not None else None)
    if config is None:
        d = a @ basis if basis is not None else None
        basis, config = None, configs.accumulate(kind, S)
    else:
        d = a.new_empty(P, R) if basis is not None else None
    blocks = triton.cdiv(N, config["NP"])
    tiles, splits = configs.pixel_splits(P, config["BM"], blocks, 4 * N * S)
    partial = torch.empty((splits, 1, N, S), dtype=torch.float32, device=a.device)
    if N:
        align = alignment(N, R, S)
        sizes = [size // align for size in (N, R, S)]
        launch(
            _project_accumulate, (splits, blocks), a, a.contiguous(),
            *(a if t is None else t.contiguous() for t in (basis, other, d)), partial, P, *sizes, tiles,
            RP=configs.padded(R), SP=configs.padded(S), PROJECT=basis is not None, ALIGN=align,
            PRECISION=precision(kind), WIDE=needs_wide(a, other), **config,
        )  # fmt: skip
    return d, ordered_sum(partial, a.dtype)[..., 0]
