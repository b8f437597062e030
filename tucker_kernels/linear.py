"""Linear layers with a Tucker weight, the same way as `convolution.py`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tucker_kernels import cost_model, validation
from tucker_kernels.convolution import Path, convolve
from tucker_kernels.functional import Factors, check_bias, check_factors, multiply, needs_gradient
from tucker_kernels.functions import TuckerLinear
from tucker_kernels.library import call, ops


def tucker_linear(
    input: Tensor,
    core: Tensor,
    factors: Factors,
    bias: Tensor | None = None,
    out_modes: int = 1,
    path: Path = "auto",
) -> Tensor:
    """Linear layer whose weight, seen as (*out_modes, *in_modes), is `tucker_to_tensor(core, factors)`.

    Args:
        input: (..., n_in) with n_in the product of the input modes.
        core: (r_1, …, r_d), the first `out_modes` of them on the output side.
        factors: d matrices (n_i, r_i), `None` where a mode is not factorised. Two modes are U C Vᵀ.
        bias: (n_out,) or None.
        out_modes: how many leading modes make up the output.
        path: "chain" (project mode by mode, multiply by the core, expand), "reconstruct" (one product with the full
            weight), "fused" (two modes as a 1×1 convolution, in whichever kernel the back end has for that), or "auto"
            (fewest operations).

    Returns: (..., n_out). Half precisions are accepted. Differentiable to any order.

    >>> x, C, U, V = torch.randn(5, 6), torch.randn(3, 2), torch.randn(8, 3), torch.randn(6, 2)
    >>> torch.allclose(tk.tucker_linear(x, C, [U, V]), x @ (U @ C @ V.T).T, atol=1e-4)
    True
    """
    validation.tensor("core", core)
    if core.ndim < 2:
        raise ValueError(f"core has {core.ndim} modes; a linear layer has at least 2")
    check_factors("core", core, factors)
    validation.tensor("input", input, like=("core", core))
    validation.choice("path", path, ("auto", *cost_model.PATHS))
    validation.integer("out_modes", out_modes, 1, core.ndim - 1, " for this core")
    sizes = [c if f is None else f.shape[0] for c, f in zip(core.shape, factors)]
    n_out, n_in = math.prod(sizes[:out_modes]), math.prod(sizes[out_modes:])
    if input.ndim < 1 or input.shape[-1] != n_in:
        raise ValueError(f"input has shape {tuple(input.shape)}; its last dimension must be {n_in}")
    check_bias(bias, n_out, core)
    if path == "fused" and core.ndim != 2:
        raise ValueError(f"path is 'fused', which takes two modes, but core has {core.ndim}; use 'chain'")
    rows = math.prod(input.shape[:-1])
    if path == "fused" and 0 not in (rows, *sizes, *core.shape):
        return _fused_linear(input, core, factors, bias)
    modes = tuple((n, None if f is None else r) for n, r, f in zip(sizes, core.shape, factors))
    if path == "auto":
        path = cost_model.choose_linear(rows, modes, out_modes)
    if path == "reconstruct":
        weight = multiply(core, factors, range(core.ndim), False).reshape(n_out, n_in)
        return torch.nn.functional.linear(input, weight, bias)
    ours = input.is_cpu and input.dtype in validation.FULL  # halves would be widened; torch multiplies them as they are
    if core.ndim == 2 and not (ours and cost_model.in_one_call(rows, modes, out_modes)):
        x = input if factors[1] is None else input @ factors[1]
        x = torch.nn.functional.linear(x, core, bias if factors[0] is None else None)
        return x if factors[0] is None else torch.nn.functional.linear(x, factors[0], bias)
    if needs_gradient(input, core, bias, *factors):
        return TuckerLinear.apply(input, core, bias, out_modes, *factors)[0]
    return call(ops.tucker_linear_forward.default, input, core, factors, bias, out_modes, False)[0]


def _fused_linear(input, core, factors, bias):
    """U C Vᵀ x + b as a 1×1 Tucker convolution of one image whose pixels are the rows; back ends fuse that operator."""
    pixels = input.reshape(-1, input.shape[-1]).T[None, :, :, None]
    operands = (pixels, core[:, :, None, None], *factors, bias)
    y = convolve(operands, ([1, 1], [0, 0], [1, 1]), "fused", True)
    return y[0, :, :, 0].T.reshape(*input.shape[:-1], y.shape[1])


def tucker_linear_core_grad(
    input: Tensor, grad_output: Tensor, factors: Factors, sizes: Sequence[int], out_modes: int = 1
) -> Tensor:
    """Gradient of a linear layer's loss with respect to a core, seen in given bases: `∇_W L ×_i U_iᵀ`.

    Args:
        input: (..., n_in); grad_output: (..., n_out), the gradient of the loss.
        factors: d matrices (n_i, r_i) or None; sizes: the d mode sizes n_i.

    Returns: (r_1, …, r_d), (grad ×_out U_outᵀ)ᵀ (input ×_in U_inᵀ), multiplied in the cheapest order of the two sides.
    Not differentiable.
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
    rows = math.prod(input.shape[:-1])
    modes = tuple((n, None if f is None else f.shape[1]) for n, f in zip(sizes, factors))
    late_out, late_in = cost_model.project_linear_gradient(rows, modes, out_modes)
    late = [late_out] * out_modes + [late_in] * (len(sizes) - out_modes)
    of_rows, of_gradient = ([f if x == where else None for f, x in zip(factors, late)] for where in (False, True))
    with torch.no_grad():
        x = input.reshape(rows, *sizes[out_modes:])
        dy = grad_output.reshape(rows, *sizes[:out_modes])
        x = multiply(x, of_rows[out_modes:], range(1, x.ndim), True)
        dy = multiply(dy, of_rows[:out_modes], range(1, dy.ndim), True)
        flat = ops.cross_gram(dy.flatten(1), x.flatten(1), 1)
        return multiply(flat.reshape(*dy.shape[1:], *x.shape[1:]), of_gradient, range(len(sizes)), True)


@torch.no_grad()
def new_blocks(input, grad_output, bases, projected):
    """`tucker_linear_core_grad` of two modes without its leading block, which is zero, of arguments that were checked.

    projected: grad_output and input, each multiplied by the leading columns of its basis, (rows, how many these are).
    """
    projections = zip((grad_output, input), bases, projected)
    dy, x = (multiply(a.reshape(-1, a.shape[-1]), [B[:, p.shape[1] :]], [1], True) for a, B, p in projections)
    dt, z = projected
    gradient = x.new_zeros([basis.shape[1] for basis in bases])
    gradient[:, z.shape[1] :] = ops.cross_gram(torch.cat([dt, dy], 1), x, 1)
    gradient[dt.shape[1] :, : z.shape[1]] = ops.cross_gram(dy, z, 1)
    return gradient
