"""Two-mode Tucker linear layer in one kernel: projection, core and expansion without leaving the chip.

    S[p,b] = Σ_i X[p,i] V[i,b]        T[p,a] = Σ_b S[p,b] C[a,b]        Y[p,o] = Σ_a T[p,a] U[o,a] (+ bias[o])

The data gradient is the same kernel with the roles turned round: dT = dY U, dS = dT C, dX = dS Vᵀ.

Layout   X (P, I), V (I, RI), C (RO, RI) by strides, U (O, RO), Y (P, O), S (P, RI), T (P, RO), row-major.
Tiling   One program: BM rows; S reduced over I in steps of BK, then the whole core, then Y in blocks of BO columns. S
         and T are rounded to the operand dtype and stay in registers as left operands. RI, RO ≤ 256 for the 16-bit
         dtypes, 128 with TF32 products, 32 with "ieee" ones.
Numerics fp32 accumulators, ascending order, no atomics: deterministic. Float32 as `input_precision` says.
"""

import triton
import triton.language as tl

from tucker_kernels.triton import configs
from tucker_kernels.triton.launch import alignment, dtype_kind, launch, needs_wide, precision
from tucker_kernels.triton.project_accumulate import project_accumulate


@triton.jit
def _tucker_linear(
    x, v, core, u, bias, y, s, t, P, N_IN, RI, RO, N_OUT, CORE_OUT, CORE_IN,
    RIP: tl.constexpr, ROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
    SAVE: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N_IN, RI, RO, N_OUT = N_IN * ALIGN, RI * ALIGN, RO * ALIGN, N_OUT * ALIGN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    b, a = tl.arange(0, RIP), tl.arange(0, ROP)
    live = m < P
    row = m
    if WIDE:
        row = m.to(tl.int64)
    acc = tl.zeros((BM, RIP), dtype=tl.float32)
    for k0 in range(0, N_IN, BK):
        k = k0 + tl.arange(0, BK)
        left = tl.load(x + row[:, None] * N_IN + k[None, :], mask=live[:, None] & (k < N_IN)[None, :], other=0.0)
        right = tl.load(v + k[:, None] * RI + b[None, :], mask=(k < N_IN)[:, None] & (b < RI)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    inner = acc.to(x.dtype.element_ty)
    c = tl.load(
        core + a[None, :] * CORE_OUT + b[:, None] * CORE_IN, mask=(a < RO)[None, :] & (b < RI)[:, None], other=0.0
    )
    outer = tl.dot(inner, c, input_precision=PRECISION).to(x.dtype.element_ty)
    if SAVE:
        tl.store(s + row[:, None] * RI + b[None, :], inner, mask=live[:, None] & (b < RI)[None, :])
        tl.store(t + row[:, None] * RO + a[None, :], outer, mask=live[:, None] & (a < RO)[None, :])
    for o0 in range(0, N_OUT, BO):
        o = o0 + tl.arange(0, BO)
        w = tl.load(u + o[None, :] * RO + a[:, None], mask=(o < N_OUT)[None, :] & (a < RO)[:, None], other=0.0)
        out = tl.dot(outer, w, input_precision=PRECISION)
        if BIAS:
            out += tl.load(bias + o, mask=o < N_OUT, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y + row[:, None] * N_OUT + o[None, :], out.to(y.dtype.element_ty), mask=live[:, None] & (o < N_OUT)[None, :]
        )


def tucker_linear(x, core, u, v, bias=None, *, save_intermediate=False, input_precision=None, config=None):
    """X V Cᵀ Uᵀ + bias in one launch.

    Args:
        x: (P, n_in), contiguous; bfloat16, float16 or float32.
        core: (r_out, r_in), any strides; u: (n_out, r_out); v: (n_in, r_in); bias: (n_out,) or None.
        save_intermediate: also return S = X V and T = S Cᵀ, which the backward pass needs.
        input_precision: for float32, "tf32x3" (default), "ieee" or "tf32".

    Returns: (y (P, n_out), s (P, r_in) or None, t (P, r_out) or None), in the dtype of `x`.
    """
    (P, n_in), (RO, RI), n_out = x.shape, core.shape, u.shape[0]
    kind = dtype_kind(x.dtype, max(RO, RI), input_precision)
    y = x.new_empty(P, n_out)
    s, t = (x.new_empty(P, RI), x.new_empty(P, RO)) if save_intermediate else (None, None)
    config = config or configs.tucker_linear(kind, max(RI, RO))
    if P and n_out:
        align = alignment(n_in, RI, RO, n_out)
        sizes = [size // align for size in (n_in, RI, RO, n_out)]
        launch(
            _tucker_linear, (triton.cdiv(P, config["BM"]),), x, x.contiguous(), v.contiguous(), core, u.contiguous(),
            *(y if q is None else q for q in (bias, y, s, t)), P, *sizes, *core.stride(),
            RIP=configs.padded(RI), ROP=configs.padded(RO), SAVE=save_intermediate, BIAS=bias is not None, ALIGN=align,
            PRECISION=precision(kind), WIDE=needs_wide(x, y), **config,
        )  # fmt: skip
    return y, s, t


def tucker_linear_backward(grad, x, core, u, v, s, t, *, input_precision=None):
    """Gradients (dX, dC, dU, dV, dbias) of `tucker_linear` from its saved S and T.

    dT = dY U, dS = dT C, dX = dS Vᵀ in one launch; dU = dYᵀ T, dV = Xᵀ dS, dC = dTᵀ S.
    """
    dx, dt, ds = tucker_linear(grad, core.T, v, u, save_intermediate=True, input_precision=input_precision)
    accumulate = lambda a, b: project_accumulate(a, None, b, input_precision=input_precision)[1]  # noqa: E731
    return dx, accumulate(dt, s), accumulate(grad, t), accumulate(x, ds), grad.float().sum(0).to(grad.dtype)
