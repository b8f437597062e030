"""Kernels for Tucker-factorized layers: plain tensors in, plain tensors out. See `help(tucker_kernels.functional)`,
`.convolution` and `.linear`."""

from tucker_kernels import cpu as _cpu  # noqa: F401 - registers the compiled back ends
from tucker_kernels import cpu_conv as _cpu_conv  # noqa: F401
from tucker_kernels import cpu_linear as _cpu_linear  # noqa: F401
from tucker_kernels import cuda as _cuda  # noqa: F401
from tucker_kernels import functions
from tucker_kernels import triton as _triton  # noqa: F401 - registers the Triton back end; triton itself comes later
from tucker_kernels.convolution import tucker_conv, tucker_conv_core_grad
from tucker_kernels.dispatch import backends, use_backend
from tucker_kernels.functional import (
    batched_qr,
    batched_svd,
    fold,
    gram_solve,
    hosvd_truncate,
    mode_dot,
    multi_mode_dot,
    rotate_bases,
    tangent_basis,
    tucker_to_tensor,
    unfold,
)
from tucker_kernels.linear import tucker_linear, tucker_linear_core_grad

__version__ = "0.1.0"

__all__ = [
    "backends",
    "batched_qr",
    "batched_svd",
    "fold",
    "functions",
    "gram_solve",
    "hosvd_truncate",
    "mode_dot",
    "multi_mode_dot",
    "rotate_bases",
    "tangent_basis",
    "tucker_conv",
    "tucker_conv_core_grad",
    "tucker_linear",
    "tucker_linear_core_grad",
    "tucker_to_tensor",
    "unfold",
    "use_backend",
]
