"""The compiled module `_C`, and what both back ends that call it know of it."""

import functools

import torch

# What the package calls and reads in the compiled module.
CALLED = (
    *("cpu_isa", "openmp", "tile_costs", "mode_dot_cpu", "multi_mode_dot_cpu", "cross_gram_cpu"),
    *("tucker_conv_forward_cpu", "tucker_conv_backward_cpu", "tucker_linear_forward_cpu", "tucker_linear_backward_cpu"),
    *("tangent_basis_cpu", "hosvd_truncate_cpu"),
    *("rotate_bases_cpu", "gram_solve_cpu", "batched_qr_cpu", "batched_svd_cpu"),
)
CALLED_WITH_CUDA = ("cuda_architectures", "cuda_unusable")
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # tk_dtype of tucker_kernels.h
MAX_MODES = 8  # TK_MAX_MODES


@functools.cache
def native_module():
    """The compiled module, or (None, why it is missing)."""
    try:
        from tucker_kernels import _C
    except ImportError as error:
        return None, (
            f"the compiled module did not load ({error}); reinstall tucker-kernels, or in its source tree run "
            "`pip install -e .`"
        )
    called = (*CALLED, *(CALLED_WITH_CUDA if hasattr(_C, "cuda_architectures") else ()))
    missing = [name for name in called if not hasattr(_C, name)]
    if missing:
        return None, (
            f"the compiled module is older than the package (it has no {missing[0]}); reinstall tucker-kernels, or in "
            "its source tree run `make dev`"
        )
    return _C, ""


def widened(tensor):
    """The tensor in float32 or float64, which is what rank-space kernels have."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
