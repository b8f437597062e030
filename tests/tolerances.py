"""The one table of tolerances: the largest allowed |actual − expected|, relative to the largest |expected|.

Expected values are computed in float64 from the same rounded inputs, so each number is about arithmetic only. With u
the unit roundoff (float64 1.1e-16, float32 6.0e-8, float16 4.9e-4, bfloat16 3.9e-3) and n the length of the sums
(up to a few thousand in the tests), a sum in order is off by at most n u, and by about √n u in practice. Half
precisions accumulate in float32: what is left is one rounding per stored tensor.
"""

import torch

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

TOLERANCES = {
    # One contraction, n ≤ 1000; halves: one rounding.
    "mode_dot": {f64: 1e-13, f32: 2e-6, f16: 1e-3, bf16: 8e-3},
    "cross_gram": {f64: 1e-13, f32: 2e-6, f16: 1e-3, bf16: 8e-3},
    # Up to five contractions, one after the other; halves: rounded once, at the end.
    "multi_mode_dot": {f64: 1e-13, f32: 4e-6, f16: 1e-3, bf16: 8e-3},
    # Three products in a chain, or a reconstructed weight and a convolution; halves: two stored tensors and a result.
    "tucker_conv": {f64: 1e-12, f32: 1e-5, f16: 3e-3, bf16: 2.4e-2},
    "tucker_linear": {f64: 1e-12, f32: 1e-5, f16: 3e-3, bf16: 2.4e-2},
    # Their gradients: twice as many products, and sums over batch and pixels; halves: four stored tensors.
    "tucker_conv_backward": {f64: 1e-12, f32: 2e-5, f16: 5e-3, bf16: 4e-2},
    "tucker_linear_backward": {f64: 1e-12, f32: 2e-5, f16: 5e-3, bf16: 4e-2},
    # A gradient projected on both sides: three contractions; halves: two stored tensors and a result. In Winograd
    # tiles, whose transforms cancel, measured 3e-6 to 6e-6 in float32: four times the error of the direct sum.
    "core_grad": {f64: 1e-12, f32: 1e-5, f16: 3e-3, bf16: 2.4e-2},
    # The Triton kernels, in float32 or halves: two contractions, the first rounded between them; one contraction; a
    # sum over pixels in two stages, rounded once.
    "tucker_core_expand": {f32: 4e-6, f16: 2e-3, bf16: 1.6e-2},
    "tucker_core_expand_tf32": {f32: 2e-3},  # operands rounded to 11 bits, u = 4.9e-4, twice
    "project_accumulate": {f32: 2e-6, f16: 1e-3, bf16: 8e-3},
    "rank_space_wgrad": {f32: 2e-6, f16: 1e-3, bf16: 8e-3},
    # Rank space works in float64 and rounds once; Householder and Jacobi constants grow like n, n ≤ 100.
    "orthogonality": {f64: 1e-12, f32: 1e-6},
    "factorisation": {f64: 1e-12, f32: 2e-6},
}


def assert_close(actual, expected, operator, scale=None):
    """Fails unless shapes and dtypes fit and the error is within the table's bound; NaN is never close.

    `scale` replaces the largest |expected| where that may be zero by cancellation.
    """
    assert tuple(actual.shape) == tuple(expected.shape), f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    bound = TOLERANCES[operator][actual.dtype] * (float(expected.abs().max()) if scale is None else scale)
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= bound, f"{operator}: error {error:.3e} exceeds {bound:.3e} in {actual.dtype}"


def assert_sum_close(actual, expected, magnitude, length):
    """Fails unless |actual − expected| <= (length + 4) u magnitude everywhere: the a-priori bound of a sum.

    `magnitude` is the same sum of absolute values, |A||B|, in float64. Sums of any order with at most `length`
    rounded products and additions meet it (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1);
    half precisions sum in float32 and are rounded once.
    """
    assert tuple(actual.shape) == tuple(expected.shape), f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    accumulator = torch.promote_types(actual.dtype, f32)
    unit = (length + 4) * torch.finfo(accumulator).eps / 2
    if actual.dtype != accumulator:
        unit += torch.finfo(actual.dtype).eps / 2
    excess = (actual.double() - expected).abs() - unit * magnitude - torch.finfo(actual.dtype).smallest_normal
    assert bool((excess <= 0).all()), f"error exceeds (n + 4) u |A||B| by {float(excess.max()):.3e}"
