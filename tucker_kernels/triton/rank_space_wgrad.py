"""Weight gradient of a convolution in rank space, on up to two channel parts of each side, without the known block.

    H[a,c,tap] = Σ_p D[p,a] Z[p·s − pad + d·tap, c],    D = [D0 | D1],  Z = [Z0 | Z1] by channels

The augmented core gradient of the one-pass step has D0 = dT2, D1 = dY V_out, Z0 = X U_in, Z1 = X V_in, and its (D0, Z0)
block is the core's own gradient, which the backward pass has already.

Layout   D (B, OH, OW, A), Z (B, IH, IW, C), channels-last, the parts in their own tensors; H (A, C, kh, kw).
Tiling   One program: a BA × BC block of one tap (no block crosses from one part into the other) over one run of
         pixels, BM at a time. The taps of a block are neighbours in the grid and read the same pixels out of L2.
Numerics fp32 accumulators; split-K over runs of pixels into a workspace, added in order by `ordered_sum`: no atomics,
         deterministic, the same on every device.
"""

import torch
import triton
import triton.language as tl

from tucker_kernels.triton import configs
from tucker_kernels.triton.launch import alignment, dtype_kind, launch, needs_wide, precision
from tucker_kernels.triton.ordered_sum import ordered_sum


@triton.jit
def _rank_space_wgrad(
    d0, d1, z0, z1, partial, P, OH, OW, IH, IW, A0, A1, C0, C1, TILES,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, SKIP: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    A0, A1, C0, C1 = A0 * ALIGN, A1 * ALIGN, C0 * ALIGN, C1 * ALIGN
    tap, split = tl.program_id(0) % (KH * KW), tl.program_id(1)
    block = tl.program_id(0) // (KH * KW)
    blocks_a0, blocks_c0, blocks_c1 = tl.cdiv(A0, BA), tl.cdiv(C0, BC), tl.cdiv(C1, BC)
    blocks_c = blocks_c0 + blocks_c1
    # Blocks row by row; without the known one, the rows of part 0 begin at part 1 of the columns.
    ia, ic = block // blocks_c, block % blocks_c
    if SKIP:
        beyond = block - blocks_a0 * blocks_c1
        if beyond < 0:
            ia, ic = block // blocks_c1, blocks_c0 + block % blocks_c1
        else:
            ia, ic = blocks_a0 + beyond // blocks_c, beyond % blocks_c
    # Part 1 of a side, if there is one; otherwise the same tensor again, never chosen.
    d, a_size, a_start = d0, A0, 0
    if ia >= blocks_a0:
        d, a_size, a_start, ia = d1, A1, A0, ia - blocks_a0
    z, c_size, c_start = z0, C0, 0
    if ic >= blocks_c0:
        z, c_size, c_start, ic = z1, C1, C0, ic - blocks_c0
    a, c = ia * BA + tl.arange(0, BA), ic * BC + tl.arange(0, BC)

    acc = tl.zeros((BA, BC), dtype=tl.float32)
    for i in range(0, TILES):
        m = (split * TILES + i) * BM + tl.arange(0, BM)
        ow, oh, b = m % OW, (m // OW) % OH, m // (OW * OH)
        ih, iw = oh * SH - PH + DH * (tap // KW), ow * SW - PW + DW * (tap % KW)
        live = m < P
        inside = live & (ih >= 0) & (ih < IH) & (iw >= 0) & (iw < IW)
        row, source = m, (b * IH + ih) * IW + iw
        if WIDE:
            row, source = row.to(tl.int64), source.to(tl.int64)
        x = tl.load(d + row[:, None] * a_size + a[None, :], mask=live[:, None] & (a < a_size)[None, :], other=0.0)
        w = tl.load(z + source[:, None] * c_size + c[None, :], mask=inside[:, None] & (c < c_size)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), w, acc, input_precision=PRECISION)
    C = C0 + C1
    start = tl.cast(split * (KH * KW) + tap, tl.int64) * (A0 + A1) * C
    out = partial + start + (a_start + a)[:, None] * C + (c_start + c)[None, :]
    tl.store(out, acc, mask=(a < a_size)[:, None] & (c < c_size)[None, :])


def rank_space_wgrad(
    z, d, window, stride=(1, 1), padding=(0, 0), dilation=(1, 1), *, known=None, input_precision=None, config=None
):
    """The weight gradient between rank-space images, on one or two channel parts of each side.

    Args:
        z: one or two images (B, C_i, IH, IW) of the input side; d: one or two (B, A_i, OH, OW) of the output side.
            Channels-last; bfloat16, float16 or float32.
        window, stride, padding, dilation: of the convolution, one integer per window dimension.
        known: (A_0, C_0, *window), or a number, the block between the first parts, copied instead of computed.
        input_precision: for float32, "tf32x3" (default), "ieee" or "tf32".

    Returns: (ΣA, ΣC, *window), contiguous, in the dtype of `z`.
    """
    z, d = _parts(z), _parts(d)
    kind = dtype_kind(z[0].dtype, 1, input_precision)
    (B, C0, IH, IW), (_, A0, OH, OW) = z[0].shape, d[0].shape
    C1, A1 = z[1].shape[1] if len(z) > 1 else 0, d[1].shape[1] if len(d) > 1 else 0
    config = config or configs.rank_space_wgrad(kind, max(A0, A1), max(C0, C1))
    taps, P = window[0] * window[1], B * OH * OW
    blocks_a0, blocks_a1 = triton.cdiv(A0, config["BA"]), triton.cdiv(A1, config["BA"])
    blocks_c0, blocks_c1 = triton.cdiv(C0, config["BC"]), triton.cdiv(C1, config["BC"])
    blocks = (blocks_a0 + blocks_a1) * (blocks_c0 + blocks_c1) - (blocks_a0 * blocks_c0 if known is not None else 0)
    tiles, splits = configs.pixel_splits(P, config["BM"], blocks * taps, 4 * taps * (A0 + A1) * (C0 + C1))
    partial = torch.empty((splits, taps, A0 + A1, C0 + C1), dtype=torch.float32, device=z[0].device)
    if blocks:
        align = alignment(A0, A1, C0, C1)
        channels = [size // align for size in (A0, A1, C0, C1)]
        launch(
            _rank_space_wgrad, (blocks * taps, splits), z[0], d[0], d[-1], z[0], z[-1], partial,
            *(P, OH, OW, IH, IW, *channels, tiles, *window, *stride, *padding, *dilation),
            SKIP=known is not None, ALIGN=align, PRECISION=precision(kind), WIDE=needs_wide(*z, *d), **config,
        )  # fmt: skip
    h = ordered_sum(partial, z[0].dtype).reshape(A0 + A1, C0 + C1, *window)
    if known is not None:
        h[:A0, :C0] = known
    return h


def _parts(images):
    images = [images] if isinstance(images, torch.Tensor) else list(images)
    return [t.contiguous(memory_format=torch.channels_last) for t in images]
