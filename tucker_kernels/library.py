"""The operators as torch sees them: one schema each, one fake, and a call into the back-end table.

They are functional (new tensors, no aliases). What is differentiable is written in `functions.py`, which hands its
`torch.autograd.Function`s to `differentiable` here, so that `torch.ops.tucker_kernels.*` called directly has the same
gradients; the others refuse. Public argument checking happens in `functional.py`: these trust what they are given.
"""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tucker_kernels import reference
from tucker_kernels.dispatch import implementation

NAMESPACE = "tucker_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_functions: dict[str, Callable] = {}  # operator -> the differentiable function over the same arguments

# The guard torch's own Autograd kernels set around what they call; it has no public name.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def differentiable(operator, function):
    """Says that `function`, called with the arguments of `operator`, is its differentiable form."""
    _functions[operator] = function


def call(operator, *args):
    """Calls an operator without asking its Autograd kernel: for `torch.autograd.Function`s, and under `no_grad`."""
    if torch.compiler.is_dynamo_compiling():  # the tracer knows no such guard, and pays no overhead
        return operator(*args)
    with _below_autograd():
        return operator(*args)


def _needs_gradient(args):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _needs_gradient(arg):
            return True
    return False


def _one_by_one(operator):
    """The vmap rule of an operator: one call for every sample, the results stacked."""

    def rule(info, in_dims, *args):
        flat, structure = tree_flatten(args)
        dims = tree_leaves(in_dims, is_leaf=lambda dim: dim is None)

        def sample(i):
            return tree_unflatten([x if d is None else x.select(d, i) for x, d in zip(flat, dims)], structure)

        results = [tree_flatten(operator(*sample(i))) for i in range(info.batch_size)]
        stacked = [torch.stack(leaves) for leaves in zip(*(leaves for leaves, _ in results))]
        return tuple(tree_unflatten(x, results[0][1]) for x in (stacked, [0] * len(stacked)))

    return rule


def _define(schema, fake, device_of):
    name = schema.split("(", 1)[0]
    _library.define(schema)
    operator = getattr(torch.ops.tucker_kernels, name).default

    def run(*args):
        return implementation(name, device_of(args).device.type, args)(*args)

    def autograd(*args):
        if torch.is_grad_enabled() and _needs_gradient(args):
            if name not in _functions:
                raise RuntimeError(
                    f"torch.ops.{NAMESPACE}.{name} is not differentiable, and an argument requires gradients; detach "
                    "it, or use the function of tucker_kernels that is built on it"
                )
            if reference.transformed():
                raise RuntimeError(
                    f"torch.ops.{NAMESPACE}.{name} has no derivative inside torch.func's transforms where it is called "
                    "directly; call the function of tucker_kernels that is built on it"
                )
            return _functions[name](*args)
        with _below_autograd():
            return operator(*args)

    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _one_by_one(operator), lib=_library)


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
# Of one dtype each, float32 or float64, with modes from 0 on.
_define(
    "grouped_mode_dot(Tensor[] tensors, Tensor[] matrices, int[] counts, int[] modes, bool transpose) -> Tensor[]",
    reference.grouped_mode_dot,
    _first_of_list,
)
_define(
    "grouped_cross_gram(Tensor[] a, Tensor[] b, int[] modes) -> Tensor[]",
    reference.grouped_cross_gram,
    _first_of_list,
)
_define(
    "tucker_conv_forward(Tensor input, Tensor core, Tensor? out_factor, Tensor? in_factor, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, str path, bool save) -> (Tensor, Tensor, Tensor)",
    reference.tucker_conv_forward,
    _first,
)
_define(
    "tucker_conv_backward(Tensor grad, Tensor input, Tensor z, Tensor t, Tensor core, Tensor? out_factor, "
    "Tensor? in_factor, int[] stride, int[] padding, int[] dilation, bool[] need, str path) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.tucker_conv_backward,
    _first,
)
_define(
    "rank_space_wgrad(Tensor input, Tensor grad, Tensor? out_basis, Tensor? in_basis, int[] window, "
    "int[] stride, int[] padding, int[] dilation, int[] known=[]) -> Tensor",
    reference.rank_space_wgrad,
    _first,
)
_define(
    "tucker_linear_forward(Tensor input, Tensor core, Tensor?[] factors, Tensor? bias, int out_modes, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    reference.tucker_linear_forward,
    _first,
)
_define(
    "tucker_linear_backward(Tensor grad, Tensor input, Tensor z, Tensor t, Tensor core, Tensor?[] factors, "
    "int out_modes, bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    reference.tucker_linear_backward,
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


def _fake_rotate_bases(bases, rotations):
    return [b.new_empty(b.shape[0], p.shape[1]) for b, p in zip(bases, rotations)]


_define("rotate_bases(Tensor[] bases, Tensor[] rotations) -> Tensor[]", _fake_rotate_bases, _first_of_list)


def _fake_gram_solve(tensors, modes, right_sides):
    return [_contiguous_like(b) for b in right_sides]


_define("gram_solve(Tensor[] tensors, int[] modes, Tensor[] right_sides) -> Tensor[]", _fake_gram_solve, _first_of_list)


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
