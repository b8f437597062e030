"""Core convolution and 1×1 expansion in one kernel: the second half of a Tucker convolution and of its data gradient.

    forward        T[p,a] = Σ_{tap,c} Z[p·s − pad + d·tap, c] C[a,c,tap]        Y[p,n] = f(Σ_a T[p,a] U[n,a] + b[n])
    transposed     T[q,a] = Σ_{tap,c} Z[(q + pad − d·tap)/s, c] C[c,a,tap]      Y[q,n] as above

over the taps where the division is exact. With Z = dY U_out and U = U_in the transposed form gives dz, the
intermediate, and dX of the same layer.

Layout   Z (B, IH, IW, C), Y (B, OH, OW, N), T (B, OH, OW, R): channels last. Core packed as (taps, R, C), U (N, R).
Tiling   One program: BM pixels, all R ≤ 256 columns of T (fp32 registers), reduced over taps × C in steps of BK; T is
         rounded to the operand dtype and stays in registers as the left operand of the second product, BN columns of Y
         at a time. Shared memory per stage: (BM·BK + RP·BK) or RP·BN elements. A transposed convolution of stride s is
         split into its s_h·s_w residue classes, one per program, so that every tap a program visits is a real one.
Numerics fp32 accumulators, taps in ascending order, no atomics: deterministic. Float32 operands are multiplied as
         `input_precision` says: "tf32x3" (three TF32 products, about float32) or "ieee" (FFMA).
"""

import math

import torch
import triton
import triton.language as tl

from tucker_kernels.reference import output_size
from tucker_kernels.triton import configs
from tucker_kernels.triton.launch import alignment, dtype_kind, launch, needs_wide, precision
from tucker_kernels.validation import choice

ACTIVATIONS = (None, "relu", "silu")


@triton.jit
def _first_tap(
    residue, offset: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr
):
    """The first tap of a residue class, the least k with (residue + offset − d·k) ≡ 0 mod s; K if there is none."""
    first = residue * 0 + K
    for back in tl.static_range(STEP):
        k = STEP - 1 - back
        # Stays non-negative: Triton's % has the sign of its left operand.
        shifted = residue + offset + STRIDE * DILATION * STEP - DILATION * k
        first = tl.where(shifted % STRIDE == 0, k, first)
    return first


@triton.jit
def _tucker_core_expand(
    z, weight, factor, bias, y, t,
    B, IH, IW, C, OH, OW, R, N,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TAP_STEP_H: tl.constexpr, TAP_STEP_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, SAVE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    C, R, N = C * ALIGN, R * ALIGN, N * ALIGN
    tile = tl.program_id(0)
    # Pixels of this program, as a grid GH × GW of one residue class of the output.
    if TRANSPOSED:
        residue = tile % (SH * SW)
        tile = tile // (SH * SW)
        residue_h, residue_w = residue // SW, residue % SW
        GH, GW = (OH + SH - 1) // SH, (OW + SW - 1) // SW
        first_h = _first_tap(residue_h, PH, KH, DH, SH, TAP_STEP_H)
        first_w = _first_tap(residue_w, PW, KW, DW, SW, TAP_STEP_W)
        taps_h = tl.maximum((KH - first_h + TAP_STEP_H - 1) // TAP_STEP_H, 0)
        taps_w = tl.maximum((KW - first_w + TAP_STEP_W - 1) // TAP_STEP_W, 0)
    else:
        GH, GW = OH, OW
        taps_h, taps_w = KH, KW
    m = tile * BM + tl.arange(0, BM)
    gw, gh, b = m % GW, (m // GW) % GH, m // (GW * GH)
    if TRANSPOSED:
        oh, ow = gh * SH + residue_h, gw * SW + residue_w
    else:
        oh, ow = gh, gw
    live = (b < B) & (oh < OH) & (ow < OW)

    r = tl.arange(0, RP)
    steps = (C + BK - 1) // BK
    acc = tl.zeros((BM, RP), dtype=tl.float32)
    for i in range(0, taps_h * taps_w * steps):
        tap = i // steps
        k = (i - tap * steps) * BK + tl.arange(0, BK)
        if TRANSPOSED:
            kh = first_h + (tap // taps_w) * TAP_STEP_H
            kw = first_w + (tap % taps_w) * TAP_STEP_W
            ih, iw = (oh + PH - DH * kh) // SH, (ow + PW - DW * kw) // SW
            # Exact where the tap belongs to the class; a negative numerator is a whole multiple and stays negative.
            inside = live & (ih >= 0) & (ih < IH) & (iw >= 0) & (iw < IW)
        else:
            kh, kw = tap // KW, tap % KW
            ih, iw = oh * SH - PH + DH * kh, ow * SW - PW + DW * kw
            inside = live & (ih >= 0) & (ih < IH) & (iw >= 0) & (iw < IW)
        row = (b * IH + ih) * IW + iw
        if WIDE:
            row = row.to(tl.int64)
        a = tl.load(z + row[:, None] * C + k[None, :], mask=inside[:, None] & (k < C)[None, :], other=0.0)
        w_row = (kh * KW + kw) * R + r
        w = tl.load(weight + w_row[None, :] * C + k[:, None], mask=(r < R)[None, :] & (k < C)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    mid = acc.to(z.dtype.element_ty)
    pixel = (b * OH + oh) * OW + ow
    if WIDE:
        pixel = pixel.to(tl.int64)
    if SAVE:
        tl.store(t + pixel[:, None] * R + r[None, :], mid, mask=live[:, None] & (r < R)[None, :])
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        u = tl.load(factor + n[None, :] * R + r[:, None], mask=(n < N)[None, :] & (r < R)[:, None], other=0.0)
        out = tl.dot(mid, u, input_precision=PRECISION)
        if BIAS:
            out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "relu":
            out = tl.where(out != out, out, tl.maximum(out, 0.0))  # a NaN stays one
        elif ACTIVATION == "silu":
            out = out / (1.0 + tl.exp(-out))
        tl.store(y + pixel[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


def tucker_core_expand(
    z, core, factor, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), *, transposed_size=None,
    save_intermediate=False, activation=None, input_precision=None, config=None,
):  # fmt: skip
    """The core convolution of `z` and the expansion of its result, in one launch.

    Args:
        z: (B, C, IH, IW), channels-last; bfloat16, float16 or float32.
        core: (r_out, r_in, kh, kw); C is r_in, or r_out when transposed.
        factor: (N, R), R the core's other rank, at most 256.
        bias: (N,) or None; activation: None, "relu" or "silu", applied after the bias.
        stride, padding, dilation: of the convolution (also when transposed), one integer per window dimension.
        transposed_size: (height, width) of the result of the transposed convolution, the data gradient. None: forward.
        save_intermediate: also return T, rounded to the dtype of `z`.
        input_precision: for float32, "tf32x3" (default) or "ieee" or "tf32".
        config: tile sizes instead of the table's, for tests and benchmarks.

    Returns: (y (B, N, OH, OW), t (B, R, OH, OW) or None), channels-last, in the dtype of `z`.
    """
    window, transposed = tuple(core.shape[2:]), transposed_size is not None
    B, C, IH, IW = z.shape
    R, N = (core.shape[1] if transposed else core.shape[0]), factor.shape[0]
    OH, OW = transposed_size if transposed else output_size((IH, IW), window, stride, padding, dilation)
    choice("activation", activation, ACTIVATIONS)
    like = {"dtype": z.dtype, "device": z.device, "memory_format": torch.channels_last}
    y = torch.empty((B, N, OH, OW), **like)
    t = torch.empty((B, R, OH, OW), **like) if save_intermediate else None
    classes = math.prod(stride) if transposed else 1
    pixels = B * (math.prod(-(-o // s) for o, s in zip((OH, OW), stride)) if transposed else OH * OW)
    if not pixels:
        return y, t
    if not C:
        raise ValueError("core has rank 0 on the input side; at least 1 is needed")
    kind = dtype_kind(z.dtype, R, input_precision)
    config = config or configs.tucker_core_expand(kind, R, C, pixels * classes)
    z = z.contiguous(memory_format=torch.channels_last)
    # (taps, R, C): the reduction index is the contiguous one, which every tensor-core dtype can read.
    weight = core.permute(2, 3, 1, 0) if transposed else core.permute(2, 3, 0, 1)
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation)]
    align = alignment(C, R, N)
    launch(
        _tucker_core_expand, (triton.cdiv(pixels, config["BM"]) * classes,), z,
        *(z, weight.contiguous(), factor.contiguous(), y if bias is None else bias, y, y if t is None else t),
        *(B, IH, IW, C // align, OH, OW, R // align, N // align, *window, *stride, *padding, *dilation, *steps),
        TRANSPOSED=transposed, SAVE=save_intermediate, BIAS=bias is not None, ACTIVATION=activation or "none",
        RP=configs.padded(R), ALIGN=align, PRECISION=precision(kind),
        WIDE=needs_wide(z, y, *([t] if save_intermediate else [])), **config,
    )  # fmt: skip
    return y, t
