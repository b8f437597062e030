"""The public operators: arguments are checked, a path is chosen, and a differentiable function is called.

Shapes are written with the weight's own order: mode 1 is output channels, mode 2 input channels, the rest the window.
Every function raises `ValueError` for shapes and ranges and `TypeError` for dtypes and kinds, and takes float32 and
float64; those that say so take bfloat16 and float16 too and accumulate in float32.
"""

import math

import torch

from tucker_kernels import cost_model, reference, validation
from tucker_kernels.backends import chosen
from tucker_kernels.functions import (
    BatchedQR,
    BatchedSVD,
    ModeDot,
    MultiModeDot,
    TuckerConv,
)
from tucker_kernels.library import call, ops

TOLERANCE_MODES = ("global", "per_mode")


def unfold(tensor, mode):
    """Mode-`mode` unfolding, (n_mode, product of the others in their order): TensorLy's convention.

    Half precisions are accepted. Differentiable.
    """
    validation.tensor("tensor", tensor)
    return reference.unfold(tensor, validation.mode("mode", mode, tensor.ndim))


def fold(matrix, mode, shape):
    """The tensor of shape `shape` whose mode-`mode` unfolding is `matrix`; inverse of `unfold`. Differentiable."""
    validation.tensor("matrix", matrix, ndim=2)
    shape = tuple(validation.integers("shape", shape, 0))
    mode = validation.mode("mode", mode, len(shape))
    expected = (shape[mode], math.prod(shape[:mode] + shape[mode + 1 :]))
    if tuple(matrix.shape) != expected:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}; folding mode {mode} of shape {shape} needs {expected}"
        )
    return reference.fold(matrix, mode, shape)


def mode_dot(tensor, matrix, mode, transpose=False):
    """n-mode product `tensor ×_mode matrix`: Y_(mode) = M X_(mode).

    Args:
        tensor: any shape with at least one dimension; its memory format is kept.
        matrix: (rows, n_mode), or (n_mode, rows) with `transpose`, of the tensor's dtype and device.
        mode: which dimension; negative values count from the end.
        transpose: multiply by Mᵀ.

    Returns: the tensor with dimension `mode` replaced by `rows`. Half precisions are accepted. Differentiable to any
    order. Source: Kolda & Bader 2009, section 2.5.
    """
    validation.tensor("tensor", tensor)
    mode = validation.mode("mode", mode, tensor.ndim)
    validation.matrix_for_mode("matrix", matrix, tensor, mode, transpose, ("tensor", tensor))
    return _mode_dot(tensor, matrix, mode, transpose)


def _needs_gradient(*operands):
    """A `Function` costs as much again as a small product, so it is left out where no gradient can be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)


def _mode_dot(tensor, matrix, mode, transpose):
    if _needs_gradient(tensor, matrix):
        return ModeDot.apply(tensor, matrix, mode, transpose)
    return call(ops.mode_dot.default, tensor, matrix, mode, transpose)


def multi_mode_dot(tensor, matrices, modes=None, skip=None, transpose=False):
    """Several n-mode products at once, in the cheapest order: `tensor ×_{m₁} M₁ ×_{m₂} M₂ …`.

    Args:
        tensor: any shape.
        matrices: one per entry of `modes`; `None` stands for the identity.
        modes: which dimensions, each at most once; default 0, 1, 2, ….
        skip: index into `matrices` of one to leave out.
        transpose: multiply by the transposes.

    Half precisions are accepted. Differentiable to any order.
    """
    validation.tensor("tensor", tensor)
    matrices = validation.sequence("matrices", matrices)
    modes = list(range(len(matrices))) if modes is None else validation.integers("modes", modes)
    if len(modes) != len(matrices):
        raise ValueError(f"modes has {len(modes)} entries, but matrices has {len(matrices)}")
    modes = [validation.mode(f"modes[{i}]", m, tensor.ndim) for i, m in enumerate(modes)]
    if len(set(modes)) != len(modes):
        raise ValueError(f"modes is {modes}; each mode may be named once")
    if skip is not None:
        matrices[validation.mode("skip", skip, len(matrices))] = None
    for i, m in enumerate(matrices):
        if m is not None:
            validation.matrix_for_mode(f"matrices[{i}]", m, tensor, modes[i], transpose, ("tensor", tensor))
    return _multi_mode_dot(tensor, matrices, modes, transpose)


def _multi_mode_dot(tensor, matrices, modes, transpose):
    """Of arguments that were checked."""
    chosen = [mode for mode, m in zip(modes, matrices) if m is not None]
    operands = [m for m in matrices if m is not None]
    if not chosen:
        return tensor
    if len(chosen) == 1:
        return _mode_dot(tensor, operands[0], chosen[0], transpose)
    if _needs_gradient(tensor, *operands):
        return MultiModeDot.apply(tensor, chosen, transpose, *operands)
    return call(ops.multi_mode_dot.default, tensor, operands, chosen, transpose)


def tucker_to_tensor(core, factors):
    """The full tensor `core ×_1 U_1 … ×_d U_d`; `None` factors are identities. Differentiable to any order.

    core: (r_1, …, r_d); factors: d matrices (n_i, r_i). Returns (n_1, …, n_d). Half precisions are accepted.
    """
    validation.tensor("core", core)
    _check_factors("core", core, factors)
    return _multi_mode_dot(core, factors, range(core.ndim), False)


def _check_factors(name, core, factors):
    if len(validation.sequence("factors", factors)) != core.ndim:
        raise ValueError(
            f"factors has {len(factors)} entries, but {name} has {core.ndim} modes; use None for a mode that is not "
            "factorised"
        )
    for i, factor in enumerate(factors):
        if factor is not None:
            validation.matrix_for_mode(f"factors[{i}]", factor, core, i, False, (name, core))


def _conv_geometry(input, core, stride, padding, dilation):
    window = core.ndim - 2
    if not 1 <= window <= 3:
        raise ValueError(f"core has {core.ndim} modes; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5")
    validation.tensor("input", input, ndim=core.ndim, like=("core", core))
    stride = validation.per_dimension("stride", stride, window, 1)
    padding = validation.per_dimension("padding", padding, window, 0)
    return stride, padding, validation.per_dimension("dilation", dilation, window, 1)


def _output_size(input, window, stride, padding, dilation):
    sizes = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(input.shape[2:], window, stride, padding, dilation)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"input of size {tuple(input.shape[2:])} with padding {tuple(padding)} is smaller than the window "
            f"{tuple(window)} with dilation {tuple(dilation)}"
        )
    return sizes


def _asked_once_per_compilation(function):
    """`torch.compiler.assume_constant_result`, without importing the whole compiler (and Triton) for it."""
    function._dynamo_marked_constant = True
    return function


@_asked_once_per_compilation
def _has_compiled_convolution(device):
    return device == "cpu" and chosen("tucker_conv_forward", device) == "cpu"


@_asked_once_per_compilation
def _threads():
    return torch.get_num_threads()


def _cheapest_path(conv, input, training):
    """The fused kernel takes part where its cost is known: on the CPU, if the compiled back end may be used."""
    fused = input.ndim <= 4 and _has_compiled_convolution(input.device.type)
    paths = ("chain", *(("fused",) if fused and input.dtype != torch.float16 else ()), "reconstruct")
    name = str(input.dtype).removeprefix("torch.")
    return cost_model.choose(conv, paths, dtype=name, training=training, threads=_threads())


def tucker_conv(input, core, factors, bias=None, stride=1, padding=0, dilation=1, path="auto", recompute=False):
    """Convolution in 1, 2 or 3 dimensions with the weight `tucker_to_tensor(core, factors)`.

    Args:
        input: (batch, C_in, *size). Contiguous and channels-last inputs keep their format.
        core: (r_out, r_in, *window ranks).
        factors: [U_out (C_out, r_out), U_in (C_in, r_in), one (window, rank) per window dimension]; `None` where a
            mode is not factorised.
        bias: (C_out,) or None.
        stride, padding, dilation: an integer or one per window dimension.
        path: "chain" (1×1 → core window → 1×1), "reconstruct" (one dense convolution with the full weight), "fused"
            (the chain in one kernel, where a back end has one), or "auto": whichever `cost_model` expects to be
            fastest.
        recompute: keep no rank-space image for the backward pass but compute it again there: less memory, more time.

    Returns: (batch, C_out, *output size). Half precisions are accepted. Differentiable to any order.
    """
    validation.tensor("core", core)
    stride, padding, dilation = _conv_geometry(input, core, stride, padding, dilation)
    _check_factors("core", core, factors)
    validation.choice("path", path, ("auto", *cost_model.PATHS))
    out_factor, in_factor, *window_factors = factors
    n_out = core.shape[0] if out_factor is None else out_factor.shape[0]
    n_in = core.shape[1] if in_factor is None else in_factor.shape[0]
    if input.shape[1] != n_in:
        raise ValueError(f"input has {input.shape[1]} channels, but the weight takes {n_in}")
    if bias is not None:
        validation.tensor("bias", bias, ndim=1, like=("core", core))
        if bias.shape[0] != n_out:
            raise ValueError(f"bias has {bias.shape[0]} entries, but the weight has {n_out} outputs")
    core = _multi_mode_dot(core, window_factors, range(2, core.ndim), False)
    window = core.shape[2:]
    sizes = _output_size(input, window, stride, padding, dilation)
    operands = (input, core, out_factor, in_factor, bias)
    if path == "auto":
        conv = cost_model.Conv(
            *(input.shape[0], n_out, n_in),
            *(None if factor is None else factor.shape[1] for factor in (out_factor, in_factor)),
            *(tuple(v) for v in (input.shape[2:], sizes, window, stride, padding, dilation)),
        )
        path = _cheapest_path(conv, input, _needs_gradient(*operands))
    if path == "reconstruct":
        weight = _multi_mode_dot(core, [out_factor, in_factor], (0, 1), False)
        convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[len(window) - 1]
        y = convolution(input, weight, bias, stride, padding, dilation)
        return y.contiguous(memory_format=reference.format_of(input))  # torch keeps it only in some dtypes
    if _needs_gradient(*operands):
        return TuckerConv.apply(*operands, stride, padding, dilation, path, not recompute)
    return call(ops.tucker_conv_forward.default, *operands, stride, padding, dilation, path, False)[0]


def tucker_conv_core_grad(input, grad_output, factors, window=None, stride=1, padding=0, dilation=1, known=None):
    """Gradient of a convolution's loss with respect to a core, seen in given bases: `∇_W L ×_i U_iᵀ`.

    One layer-local contraction of the layer's input and output gradient. With augmented bases [U|V] it is the augmented
    core gradient of the one-pass step (no second forward or backward pass).

    Args:
        input: (batch, C_in, *size); grad_output: (batch, C_out, *output size), the gradient of the loss.
        factors: as in `tucker_conv`; `None` where a mode is not factorised.
        window: the full window sizes; needed for window modes without a factor, and may be left out otherwise.
        known: (output, input), how many leading channels of the two bases the caller has the gradient of. That block,
            for all of the window, is not computed but zero.

    Returns: (r_out, r_in, *window ranks). Not differentiable.
    """
    count = len(validation.sequence("factors", factors)) - 2
    if not 1 <= count <= 3:
        raise ValueError(f"factors has {count + 2} entries; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5")
    if window is None:
        if any(f is None for f in factors[2:]):
            raise ValueError("window is None, but some window factor is None too; give the sizes")
        window = [f.shape[0] for f in factors[2:]]
    window = validation.per_dimension("window", window, count, 1)
    validation.tensor("input", input, ndim=count + 2)
    validation.tensor("grad_output", grad_output, ndim=count + 2, like=("input", input))
    stride = validation.per_dimension("stride", stride, count, 1)
    padding = validation.per_dimension("padding", padding, count, 0)
    dilation = validation.per_dimension("dilation", dilation, count, 1)
    channels = [
        (grad_output.shape[1], f"grad_output has {grad_output.shape[1]} channels"),
        (input.shape[1], f"input has {input.shape[1]} channels"),
    ]
    windows = [(k, f"window[{i}] is {k}") for i, k in enumerate(window)]
    validation.bases("factors", factors, channels + windows, ("input", input))
    expected = (input.shape[0], grad_output.shape[1], *_output_size(input, window, stride, padding, dilation))
    if tuple(grad_output.shape) != expected:
        raise ValueError(
            f"grad_output has shape {tuple(grad_output.shape)}; for this input and window it must be {expected}"
        )
    known = [] if known is None else validation.integers("known", known)
    if known:
        ranks = [n if f is None else f.shape[1] for f, (n, _) in zip(factors, channels)]
        if len(known) != 2 or not all(0 <= k <= r for k, r in zip(known, ranks)):
            raise ValueError(f"known is {tuple(known)}; allowed are two integers from 0 to {tuple(ranks)}, or none")
    with torch.no_grad():
        gradient = ops.rank_space_wgrad(
            input, grad_output, factors[0], factors[1], window, stride, padding, dilation, known
        )
        return _multi_mode_dot(gradient, factors[2:], range(2, gradient.ndim), True)


def tucker_linear(input, core, factors, bias=None, out_modes=1, path="auto"):
    """Linear layer whose weight, seen as (*out_modes, *in_modes), is `tucker_to_tensor(core, factors)`.

    Args:
        input: (..., n_in) with n_in the product of the input modes.
        core: (r_1, …, r_d), the first `out_modes` of them on the output side.
        factors: d matrices (n_i, r_i), `None` where a mode is not factorised. Two modes are U C Vᵀ.
        bias: (n_out,) or None.
        out_modes: how many leading modes make up the output.
        path: "chain" (project, multiply by the core, expand), "reconstruct" (one product with the full weight), or
            "auto" (fewest operations), or "fused": two modes as a convolution of one pixel, in whichever
            kernel the back end has for that.

    Returns: (..., n_out). Half precisions are accepted. Differentiable to any order.
    """
    validation.tensor("core", core)
    if core.ndim < 2:
        raise ValueError(f"core has {core.ndim} modes; a linear layer has at least 2")
    _check_factors("core", core, factors)
    validation.tensor("input", input, like=("core", core))
    validation.choice("path", path, ("auto", *cost_model.PATHS))
    validation.integer("out_modes", out_modes, 1, core.ndim - 1, " for this core")
    sizes = [c if f is None else f.shape[0] for c, f in zip(core.shape, factors)]
    n_out, n_in = math.prod(sizes[:out_modes]), math.prod(sizes[out_modes:])
    if input.ndim < 1 or input.shape[-1] != n_in:
        raise ValueError(f"input has shape {tuple(input.shape)}; its last dimension must be {n_in}")
    if bias is not None:
        validation.tensor("bias", bias, ndim=1, like=("core", core))
        if bias.shape[0] != n_out:
            raise ValueError(f"bias has {bias.shape[0]} entries, but the weight has {n_out} outputs")
    if path == "fused":
        if core.ndim != 2:
            raise ValueError(f"path is 'fused', which takes two modes, but core has {core.ndim}; use 'chain'")
        return _fused_linear(input, core, factors, bias)
    rows = math.prod(input.shape[:-1])
    r_out, r_in = math.prod(core.shape[:out_modes]), math.prod(core.shape[out_modes:])
    if path == "auto":
        chain = rows * (n_in * r_in + r_in * r_out + r_out * n_out)
        path = "chain" if chain <= (rows + r_in) * n_in * n_out else "reconstruct"
    if path == "reconstruct":
        weight = _multi_mode_dot(core, factors, range(core.ndim), False).reshape(n_out, n_in)
        return torch.nn.functional.linear(input, weight, bias)
    x = input.reshape(rows, *sizes[out_modes:])
    inner = _multi_mode_dot(x, factors[out_modes:], range(1, x.ndim), True).reshape(rows, r_in)
    outer = _mode_dot(inner, core.reshape(r_out, r_in), 1, False)
    outer = outer.reshape(rows, *core.shape[:out_modes])
    y = _multi_mode_dot(outer, factors[:out_modes], range(1, outer.ndim), False)
    y = y.reshape(*input.shape[:-1], n_out)
    return y if bias is None else y + bias


def _fused_linear(input, core, factors, bias):
    """U C Vᵀ x + b as a Tucker convolution of one pixel, whose operator back ends fuse."""
    x = input.reshape(-1, input.shape[-1], 1, 1)
    y = tucker_conv(x, core[:, :, None, None], [*factors, None, None], bias, path="fused")
    return y.reshape(*input.shape[:-1], y.shape[1])


def tucker_linear_core_grad(input, grad_output, factors, sizes, out_modes=1):
    """Gradient of a linear layer's loss with respect to a core, seen in given bases: `∇_W L ×_i U_iᵀ`.

    Args:
        input: (..., n_in); grad_output: (..., n_out), the gradient of the loss.
        factors: d matrices (n_i, r_i) or None; sizes: the d mode sizes n_i.

    Returns: (r_1, …, r_d), (grad ×_out U_outᵀ)ᵀ (input ×_in U_inᵀ). Not differentiable.
    """
    validation.tensor("input", input)
    validation.tensor("grad_output", grad_output, like=("input", input))
    sizes = validation.integers("sizes", sizes, 1)
    if len(sizes) != len(validation.sequence("factors", factors)):
        raise ValueError(f"sizes has {len(sizes)} entries, but factors has {len(factors)}")
    if len(sizes) < 2:
        raise ValueError(f"sizes has {len(sizes)} entries; a linear layer has at least 2 modes")
    validation.integer("out_modes", out_modes, 1, len(sizes) - 1, " for these sizes")
    validation.bases("factors", factors, [(n, f"sizes[{i}] is {n}") for i, n in enumerate(sizes)], ("input", input))
    n_out, n_in = math.prod(sizes[:out_modes]), math.prod(sizes[out_modes:])
    if input.ndim < 1 or input.shape[-1] != n_in:
        raise ValueError(f"input has shape {tuple(input.shape)}; its last dimension must be {n_in}")
    if tuple(grad_output.shape) != (*input.shape[:-1], n_out):
        raise ValueError(f"grad_output has shape {tuple(grad_output.shape)}; it must be {(*input.shape[:-1], n_out)}")
    with torch.no_grad():
        x = input.reshape(-1, *sizes[out_modes:])
        dy = grad_output.reshape(-1, *sizes[:out_modes])
        x = _multi_mode_dot(x, factors[out_modes:], range(1, x.ndim), True)
        dy = _multi_mode_dot(dy, factors[:out_modes], range(1, dy.ndim), True)
        flat = ops.cross_gram(dy.flatten(1), x.flatten(1), 1)
        return flat.reshape(*dy.shape[1:], *x.shape[1:])


def tangent_basis(bases, directions):
    """Orthonormal bases V of the directions outside the bases, for all layers and modes in one call.

    Args:
        bases: list of U (n, r) with orthonormal (or zero) columns, float32 or float64.
        directions: list of D (n, p), same length, dtype and device; columns may be dependent, tiny or zero.

    Returns:
        (list of V (n, p), counts): the first counts[i] columns of V[i] are orthonormal to each other and to U[i], the
        others exactly zero, and the span of [U|V] contains every normalised column of D to 8√n·2u. `counts` is one
        int64 tensor on the device; −1 marks a problem with a NaN or Inf, whose V is zero. Not differentiable.

    Source: block Gram–Schmidt with reorthogonalisation; Giraud, Langou, Rozložník & van den Eshof 2005.
    """
    validation.matrices("bases", bases)
    validation.matrices("directions", directions)
    if len(bases) != len(directions):
        raise ValueError(f"directions has {len(directions)} entries, but bases has {len(bases)}")
    validation.tensor("directions[0]", directions[0], like=("bases[0]", bases[0]))
    for i, (U, D) in enumerate(zip(bases, directions)):
        if U.shape[0] != D.shape[0]:
            raise ValueError(f"directions[{i}] has {D.shape[0]} rows, but bases[{i}] has {U.shape[0]}")
    with torch.no_grad():
        return ops.tangent_basis(list(bases), list(directions))


def hosvd_truncate(
    cores,
    tol=None,
    ranks=None,
    modes=None,
    tolerance_mode="global",
    min_rank=1,
    max_rank=None,
):
    """Truncated higher-order SVD of a list of cores in one call.

    Args:
        cores: list of tensors (a_1, …, a_d), float32 or float64; their number of modes may differ.
        tol: relative tolerance, one number or one per core. In mode "global" the relative error of a core is at most
            `tol`; in "per_mode" the discarded part of each mode is at most `tol` (the total up to √d times that).
        ranks: instead of `tol`, the ranks to keep: one integer, one tuple for all cores, or one per core.
        modes: which modes are truncated: `None` (all), one tuple for all cores, or one per core.
        min_rank, max_rank: bounds on the ranks that `tol` chooses; an integer, or one tuple per core.

    Returns:
        (new_cores, projections, ranks, error). new_cores[l] and projections[l][i] (a_i × a_i, or `None` for a mode that
        is not truncated) keep the size of their input and are exactly zero beyond the rank, so that
        new_cores[l] = cores[l] ×_i projections[l][i]ᵀ. ranks is an int64 device tensor (cores × most modes, 0 where a
        core has no such mode). error holds ‖C − C'×P‖/‖C‖ per core in float64; NaN marks a core with a NaN or Inf,
        which comes back unchanged with identity projections. A rank never exceeds the product of the others.
        Where a core is already close to HOSVD form, as after a small training step, a back end may skip the
        eigen-decomposition: the error stays within `tol`, and a rank may be one more than the smallest. With `ranks`
        given, only the subspaces matter: the error is at most that of the leading singular vectors of each mode,
        √Σ_i Σ_{j>r_i} σ_ij² / ‖C‖ (to 1e-4 of it), but the new core need not be in HOSVD form (orthogonal slices of
        descending norm), and `error` may be off by 1 %.
        Not differentiable.

    Source: De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition", 2000.
    """
    cores = validation.sequence("cores", cores, "tensors")
    if not cores:
        raise ValueError("cores is empty; at least one core is needed")
    for i, core in enumerate(cores):
        validation.tensor(f"cores[{i}]", core, validation.FULL, like=("cores[0]", cores[0]) if i else None)
        if core.ndim < 1 or 0 in core.shape:
            raise ValueError(f"cores[{i}] has shape {tuple(core.shape)}; every mode needs a positive size")
    validation.choice("tolerance_mode", tolerance_mode, TOLERANCE_MODES)
    if (tol is None) == (ranks is None):
        raise ValueError(f"give either tol or ranks: tol is {tol} and ranks is {ranks}")
    flags = [_mode_flags(i, core, modes, len(cores)) for i, core in enumerate(cores)]
    if tol is None:
        lower = upper = _bounds("ranks", ranks, cores)
        tols = [-1.0] * len(cores)
    else:
        lower = _bounds("min_rank", min_rank, cores)
        upper = [list(c.shape) for c in cores] if max_rank is None else _bounds("max_rank", max_rank, cores)
        if any(low > high for a, b in zip(lower, upper) for low, high in zip(a, b)):
            raise ValueError(f"min_rank is {min_rank}, above max_rank, which is {max_rank}")
        tols = validation.tolerances("tol", tol, len(cores))
    with torch.no_grad():
        new, flat, found, error = ops.hosvd_truncate(
            list(cores),
            [int(f) for row in flags for f in row],
            tols,
            [r for row in lower for r in row],
            [r for row in upper for r in row],
            tolerance_mode == "per_mode",
        )
    matrices = iter(flat)
    projections = [[p if f else None for f, p in zip(row, matrices)] for row in flags]
    return new, projections, found, error


def _mode_flags(index, core, modes, count):
    if modes is None:
        return [True] * core.ndim
    own = modes
    if isinstance(modes, (list, tuple)) and len(modes) and not isinstance(modes[0], int):
        if len(modes) != count:
            raise ValueError(f"modes has {len(modes)} entries, but there are {count} cores")
        own = modes[index]
    chosen = {validation.mode("modes", m, core.ndim) for m in validation.integers("modes", own)}
    return [i in chosen for i in range(core.ndim)]


def _bounds(name, value, cores):
    rows = []
    shared = not isinstance(value, (list, tuple)) or not len(value) or not isinstance(value[0], (list, tuple))
    if not shared and len(value) != len(cores):
        raise ValueError(f"{name} has {len(value)} entries, but there are {len(cores)} cores")
    for i, core in enumerate(cores):
        own = value if shared else value[i]
        row = validation.per_dimension(name, own, core.ndim, 1)
        rows.append([min(r, n) for r, n in zip(row, core.shape)])
    return rows


def rotate_bases(bases, rotations):
    """Bases in new coordinates, orthonormal to rounding however often it is done, for all layers and modes in one call.

    Args:
        bases: list of B (n, a) with orthonormal columns, float32 or float64.
        rotations: list of P (a, r) with orthonormal columns, same length, dtype and device; leading columns of a larger
            matrix (`projection[:, :r]`) are not copied.

    Returns: list of Q (3I − QᵀQ) / 2 (n, r) with Q = B P. A Q that is orthonormal to ε comes out orthonormal to ¾ε² and
    rounding. Not differentiable.

    Source: one Newton step for the polar factor; Björck & Bowie, "An iterative algorithm for computing the best
    estimate of an orthogonal matrix", 1971.
    """
    validation.matrices("bases", bases)
    validation.matrices("rotations", rotations)
    if len(bases) != len(rotations):
        raise ValueError(f"rotations has {len(rotations)} entries, but bases has {len(bases)}")
    validation.tensor("rotations[0]", rotations[0], like=("bases[0]", bases[0]))
    for i, (B, P) in enumerate(zip(bases, rotations)):
        if P.shape[0] != B.shape[1]:
            raise ValueError(f"rotations[{i}] has {P.shape[0]} rows, but bases[{i}] has {B.shape[1]} columns")
    with torch.no_grad():
        return ops.rotate_bases(list(bases), list(rotations))


def batched_qr(matrices):
    """Reduced QR of a list of matrices of different sizes in one call.

    Args: matrices: list of (m_i, n_i), float32 or float64.
    Returns: (list of Q (m_i, k_i), list of R (k_i, n_i)), k_i = min(m_i, n_i), A = Q R, R upper triangular with a
    non-negative diagonal. Columns of Q are orthonormal (a back end may return exactly zero columns of Q, and rows of
    R, where a column depends on those before it). Differentiable where m_i ≥ n_i and the rank is full.
    """
    matrices = validation.matrices("matrices", matrices)
    if not _needs_gradient(*matrices):
        return tuple(call(ops.batched_qr.default, matrices))
    flat = BatchedQR.apply(*matrices)
    return list(flat[: len(matrices)]), list(flat[len(matrices) :])


def batched_svd(matrices):
    """Thin SVD of a list of matrices of different sizes in one call: A = U diag(s) Vh, s descending.

    Args: matrices: list of (m_i, n_i), float32 or float64.
    Returns: lists of U (m_i, k_i), s (k_i,), Vh (k_i, n_i), k_i = min(m_i, n_i). Differentiable where the singular
    values are distinct and non-zero; signs of singular vectors are not determined.
    """
    matrices = validation.matrices("matrices", matrices)
    if not _needs_gradient(*matrices):
        return tuple(call(ops.batched_svd.default, matrices))
    flat, count = BatchedSVD.apply(*matrices), len(matrices)
    return list(flat[:count]), list(flat[count : 2 * count]), list(flat[2 * count :])
