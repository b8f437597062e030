"""The operators as torch sees them: one schema each, one fake, and a call into the back-end table.

They are functional (new tensors, no aliases) and know nothing of autograd; `functions.py` does. Public argument
checking happens in `functional.py`, so these trust what they are given.
"""

import torch

from tucker_kernels import backends, reference

NAMESPACE = "tucker_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def _define(schema, fake, device_of):
    name = schema.split("(", 1)[0]
    _library.define(schema)

    @torch.no_grad()  # an operator is opaque to autograd, also where it is made of torch operations
    def call(*args):
        return backends.implementation(name, device_of(args).device.type)(*args)

    _library.impl(name, call, "CPU")
    _library.impl(name, call, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _first(args):
    return args[0]


def _first_of_list(args):
    return args[0][0]


# Written in plain torch, the reference is its own shape rule wherever no value decides a shape.
_define(
    "mode_dot(Tensor tensor, Tensor matrix, int mode, bool transpose) -> Tensor",
    reference.mode_dot,
    _first,
)
_define(
    "multi_mode_dot(Tensor tensor, Tensor[] matrices, int[] modes, bool transpose) -> Tensor",
    reference.multi_mode_dot,
    _first,
)
_define("cross_gram(Tensor a, Tensor b, int mode) -> Tensor", reference.cross_gram, _first)
_define(
    "tucker_conv_forward(Tensor input, Tensor core, Tensor? out_factor, Tensor? in_factor, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor)",
    reference.tucker_conv_forward,
    _first,
)
_define(
    "tucker_conv_backward(Tensor grad, Tensor input, Tensor z, Tensor t, Tensor core, Tensor? out_factor, "
    "Tensor? in_factor, int[] stride, int[] padding, int[] dilation, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.tucker_conv_backward,
    _first,
)
_define(
    "rank_space_wgrad(Tensor input, Tensor grad, Tensor? out_basis, Tensor? in_basis, int[] window, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor",
    reference.rank_space_wgrad,
    _first,
)


def _contiguous_like(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_tangent_basis(bases, directions):
    counts = bases[0].new_empty(len(bases), dtype=torch.int64)
    return [_contiguous_like(d) for d in directions], counts


_define(
    "tangent_basis(Tensor[] bases, Tensor[] directions) -> (Tensor[], Tensor)",
    _fake_tangent_basis,
    _first_of_list,
)


def _fake_hosvd_truncate(cores, modes, tol, min_ranks, max_ranks, per_mode):
    flags = iter(modes)
    projections = [c.new_empty(n, n) if next(flags) else c.new_empty(0) for c in cores for n in c.shape]
    ranks = cores[0].new_empty(len(cores), max(c.ndim for c in cores), dtype=torch.int64)
    error = cores[0].new_empty(len(cores), dtype=torch.float64)
    return [_contiguous_like(c) for c in cores], projections, ranks, error


_define(
    "hosvd_truncate(Tensor[] cores, int[] modes, float[] tol, int[] min_ranks, int[] max_ranks, bool per_mode) "
    "-> (Tensor[], Tensor[], Tensor, Tensor)",
    _fake_hosvd_truncate,
    _first_of_list,
)


def _fake_qr(matrices):
    inner = [min(a.shape) for a in matrices]
    return (
        [a.new_empty(a.shape[0], k) for a, k in zip(matrices, inner)],
        [a.new_empty(k, a.shape[1]) for a, k in zip(matrices, inner)],
    )


_define("batched_qr(Tensor[] matrices) -> (Tensor[], Tensor[])", _fake_qr, _first_of_list)


def _fake_svd(matrices):
    us, vs = _fake_qr(matrices)
    return us, [u.new_empty(u.shape[1]) for u in us], vs


_define("batched_svd(Tensor[] matrices) -> (Tensor[], Tensor[], Tensor[])", _fake_svd, _first_of_list)

ops = torch.ops.tucker_kernels
