"""The public operators of multilinear algebra: arguments are checked and a differentiable function is called.

The layers made of them are in `convolution.py` and `linear.py`.

Every function raises `ValueError` for shapes and ranges and `TypeError` for dtypes and kinds, and takes float32 and
float64; those that say so take bfloat16 and float16 too and accumulate in float32.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tucker_kernels import reference, validation
from tucker_kernels.functions import BatchedQR, BatchedSVD, ModeDot, MultiModeDot
from tucker_kernels.library import call, ops

TOLERANCE_MODES = ("global", "per_mode")
Factors = Sequence[Tensor | None]  # one per mode; None stands for the identity
PerMode = int | Sequence[int] | Sequence[Sequence[int]]  # one for all modes, one per mode, or these for every core


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-`mode` unfolding, (n_mode, product of the others in their order): TensorLy's convention.

    Half precisions are accepted. Differentiable.
    """
    validation.tensor("tensor", tensor)
    return reference.unfold(tensor, validation.mode("mode", mode, tensor.ndim))


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
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


def mode_dot(tensor: Tensor, matrix: Tensor, mode: int, transpose: bool = False) -> Tensor:
    """n-mode product `tensor ×_mode matrix`: Y_(mode) = M X_(mode).

    Args:
        tensor: any shape with at least one dimension; its memory format is kept.
        matrix: (rows, n_mode), or (n_mode, rows) with `transpose`, of the tensor's dtype and device.
        mode: which dimension; negative values count from the end.
        transpose: multiply by Mᵀ.

    Returns: the tensor with dimension `mode` replaced by `rows`. Half precisions are accepted. Differentiable to any
    order. Source: Kolda & Bader 2009, section 2.5.

    >>> tk.mode_dot(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0]]), mode=1)     # sums of rows
    tensor([[3.],
            [7.]])
    """
    validation.tensor("tensor", tensor)
    mode = validation.mode("mode", mode, tensor.ndim)
    validation.matrix_for_mode("matrix", matrix, tensor, mode, transpose, ("tensor", tensor))
    return _mode_dot(tensor, matrix, mode, transpose)


def needs_gradient(*operands):
    """A `Function` costs as much again as a small product, so it is left out where no gradient can be asked for."""
    if not torch.is_grad_enabled():
        return False
    # An operand of vmap does not say whether it needs one.
    return reference.transformed() or any(x is not None and x.requires_grad for x in operands)


def _mode_dot(tensor, matrix, mode, transpose):
    if needs_gradient(tensor, matrix):
        return ModeDot.apply(tensor, matrix, mode, transpose)
    return call(ops.mode_dot.default, tensor, matrix, mode, transpose)


def multi_mode_dot(
    tensor: Tensor,
    matrices: Factors,
    modes: Sequence[int] | None = None,
    skip: int | None = None,
    transpose: bool = False,
) -> Tensor:
    """Several n-mode products at once, in the cheapest order: `tensor ×_{m₁} M₁ ×_{m₂} M₂ …`.

    Args:
        tensor: any shape.
        matrices: one per entry of `modes`; `None` stands for the identity.
        modes: which dimensions, each at most once; default 0, 1, 2, ….
        skip: index into `matrices` of one to leave out.
        transpose: multiply by the transposes.

    Returns: the tensor with each of these dimensions replaced by the rows of its matrix. Half precisions are accepted.
    Differentiable to any order.

    >>> tk.multi_mode_dot(torch.ones(2, 3, 4), [torch.ones(1, 2), None, torch.ones(1, 4)])
    tensor([[[8.],
             [8.],
             [8.]]])
    """
    validation.tensor("tensor", tensor)
    chosen = validation.sequence("matrices", matrices)
    modes = list(range(len(chosen))) if modes is None else validation.integers("modes", modes)
    if len(modes) != len(chosen):
        raise ValueError(f"modes has {len(modes)} entries, but matrices has {len(chosen)}")
    modes = [validation.mode(f"modes[{i}]", m, tensor.ndim) for i, m in enumerate(modes)]
    if len(set(modes)) != len(modes):
        raise ValueError(f"modes is {modes}; each mode may be named once")
    if skip is not None:
        chosen[validation.mode("skip", skip, len(chosen))] = None
    for i, m in enumerate(chosen):
        if m is not None:
            validation.matrix_for_mode(f"matrices[{i}]", m, tensor, modes[i], transpose, ("tensor", tensor))
    return multiply(tensor, chosen, modes, transpose)


def multiply(tensor, matrices, modes, transpose):
    """`multi_mode_dot` of arguments that were checked."""
    chosen = [mode for mode, m in zip(modes, matrices) if m is not None]
    operands = [m for m in matrices if m is not None]
    if not chosen:
        return tensor
    if len(chosen) == 1:
        return _mode_dot(tensor, operands[0], chosen[0], transpose)
    if needs_gradient(tensor, *operands):
        return MultiModeDot.apply(tensor, chosen, transpose, *operands)
    return call(ops.multi_mode_dot.default, tensor, operands, chosen, transpose)


def tucker_to_tensor(core: Tensor, factors: Factors) -> Tensor:
    """The full tensor `core ×_1 U_1 … ×_d U_d`; `None` factors are identities. Differentiable to any order.

    core: (r_1, …, r_d); factors: d matrices (n_i, r_i). Returns (n_1, …, n_d). Half precisions are accepted.
    """
    validation.tensor("core", core)
    check_factors("core", core, factors)
    return multiply(core, factors, range(core.ndim), False)


def check_factors(name, core, factors):
    """Raises where `factors` are not one per mode of the core, each a matrix (n_i, r_i) or None."""
    if len(validation.sequence("factors", factors)) != core.ndim:
        raise ValueError(
            f"factors has {len(factors)} entries, but {name} has {core.ndim} modes; use None for a mode that is not "
            "factorised"
        )
    for i, factor in enumerate(factors):
        if factor is not None:
            validation.matrix_for_mode(f"factors[{i}]", factor, core, i, False, (name, core))


def check_bias(bias, n_out, core):
    """Raises where `bias` is neither None nor a vector with one entry per output of the core's weight."""
    if bias is not None:
        validation.tensor("bias", bias, ndim=1, like=("core", core))
        if bias.shape[0] != n_out:
            raise ValueError(f"bias has {bias.shape[0]} entries, but the weight has {n_out} outputs")


def tangent_basis(bases: Sequence[Tensor], directions: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Orthonormal bases V of the directions outside the bases, for all layers and modes in one call.

    Args:
        bases: list of U (n, r) with orthonormal (or zero) columns, float32 or float64.
        directions: list of D (n, p), same length, dtype and device; columns may be dependent, tiny or zero, which those
                of norm below 1e-30 count as.

    Returns:
        (list of V (n, p), counts): the first counts[i] columns of V[i] are orthonormal to each other and to U[i], the
        others exactly zero, and the span of [U|V] contains every normalised column of D to 8√n·2u. `counts` is one
        int64 tensor on the device; −1 marks a problem with a NaN or Inf, whose V is zero. Not differentiable.

    Source: block Gram–Schmidt with reorthogonalisation; Giraud, Langou, Rozložník & van den Eshof 2005.

    >>> U, D = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[5.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    >>> (V,), counts = tk.tangent_basis([U], [D])               # the second direction lies in U
    >>> V.abs(), counts
    (tensor([[0., 0.],
            [1., 0.],
            [0., 0.]]), tensor([1]))
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
    cores: Sequence[Tensor],
    tol: float | Sequence[float] | None = None,
    ranks: PerMode | None = None,
    modes: Sequence[int] | Sequence[Sequence[int]] | None = None,
    tolerance_mode: Literal["global", "per_mode"] = "global",
    min_rank: PerMode = 1,
    max_rank: PerMode | None = None,
) -> tuple[list[Tensor], list[list[Tensor | None]], Tensor, Tensor]:
    """Truncated higher-order SVD of a list of cores in one call.

    Args:
        cores: list of tensors (a_1, …, a_d), float32 or float64; their number of modes may differ.
        tol: relative tolerance, one number or one per core. In mode "global" the relative error of a core is at most
            `tol`; in "per_mode" the discarded part of each mode is at most `tol` (the total up to √d times that).
        ranks: instead of `tol`, the ranks to keep: one integer, one tuple for all cores, or one per core.
        modes: which modes are truncated: `None` (all), one tuple for all cores, or one per core.
        min_rank, max_rank: bounds on the ranks that `tol` chooses; given as `ranks` are.

    Returns:
        (new_cores, projections, ranks, error). new_cores[l] and projections[l][i] (a_i × a_i, or `None` for a mode that
        is not truncated) keep the size of their input and are exactly zero beyond the rank, so that
        new_cores[l] = cores[l] ×_i projections[l][i]ᵀ. ranks is an int64 device tensor (cores × most modes, 0 where a
        core has no such mode). error holds ‖C − C'×P‖/‖C‖ per core in float64; NaN marks a core with a NaN or Inf,
        which comes back unchanged with identity projections. A rank never exceeds the product of the others.
        Where a core is already close to HOSVD form, as after a small training step, a back end may skip the
        eigen-decomposition: the error stays within `tol`, and a rank may be one more than the smallest. With `ranks`
        given, only the subspaces matter, and in float32 one orthogonal iteration may replace the solve: the error is at
        most that of the leading singular vectors of each mode, √Σ_i Σ_{j>r_i} σ_ij² / ‖C‖ (to 1e-4 of it and rounding),
        but the new core need not be in HOSVD form (orthogonal slices of descending norm), and `error` may be off by 1 %
        of itself and rounding.
        Not differentiable.

    Source: De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition", 2000.

    >>> core = torch.diag(torch.tensor([4.0, 3.0, 0.5]))
    >>> (new,), ((P, Q),), ranks, error = tk.hosvd_truncate([core], tol=0.2)
    >>> ranks, bool(torch.allclose(error, torch.tensor(0.5 / 25.25**0.5).double()))
    (tensor([[2, 2]]), True)
    >>> torch.allclose(P @ new @ Q.T, torch.diag(torch.tensor([4.0, 3.0, 0.0])), atol=1e-5)
    True
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
        given = f"tol is {validation.shown(tol)} and ranks is {validation.shown(ranks)}"
        raise ValueError(f"give either tol or ranks: {given}")
    if modes is not None and not isinstance(modes, (list, tuple)):
        modes = validation.integers("modes", modes)
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
    if isinstance(modes, (list, tuple)) and len(modes) and not isinstance(modes[0], validation.INTEGER):
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


def rotate_bases(bases: Sequence[Tensor], rotations: Sequence[Tensor]) -> list[Tensor]:
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


def gram_solve(tensors: Sequence[Tensor], modes: Sequence[int], right_sides: Sequence[Tensor]) -> list[Tensor]:
    """Division by the Gram matrices of unfoldings, for all layers and modes in one call.

    Args:
        tensors: list of C, float32 or float64.
        modes: list of the mode of each.
        right_sides: list of B (p, n), n the size of that mode; same length, dtype and device.

    Returns: list of X = B (M Mᵀ + ρ I)⁻¹ (p, n) with M = Mat_mode(C) and ρ = 4ε tr(M Mᵀ). ρ is the rounding of M Mᵀ:
    X ×_mode C is the least tensor whose product with Mᵀ is B, as far as the precision tells; a deficient C is no
    error, and C = 0 gives 0. Not differentiable.

    Source: the normal equations with Tikhonov's regularisation.
    """
    tensors = validation.sequence("tensors", tensors, "tensors")
    if not tensors:
        raise ValueError("tensors is empty; at least one tensor is needed")
    validation.matrices("right_sides", right_sides)
    modes = validation.integers("modes", modes)
    for name, given in (("modes", modes), ("right_sides", right_sides)):
        if len(given) != len(tensors):
            raise ValueError(f"{name} has {len(given)} entries, but tensors has {len(tensors)}")
    checked = []
    for i, (C, mode, B) in enumerate(zip(tensors, modes, right_sides)):
        validation.tensor(f"tensors[{i}]", C, validation.FULL, like=("tensors[0]", tensors[0]) if i else None)
        checked.append(validation.mode(f"modes[{i}]", mode, C.ndim))
        n = C.shape[checked[-1]]
        if B.shape[1] != n:
            raise ValueError(f"right_sides[{i}] has {B.shape[1]} columns, but mode {mode} of tensors[{i}] has size {n}")
    validation.tensor("right_sides[0]", right_sides[0], like=("tensors[0]", tensors[0]))
    with torch.no_grad():
        return ops.gram_solve(list(tensors), checked, list(right_sides))


def batched_qr(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Reduced QR of a list of matrices of different sizes in one call.

    Args: matrices: list of (m_i, n_i), float32 or float64.
    Returns: (list of Q (m_i, k_i), list of R (k_i, n_i)), k_i = min(m_i, n_i), A = Q R, R upper triangular with a
    non-negative diagonal. Columns of Q are orthonormal (a back end may return exactly zero columns of Q, and rows of
    R, where a column depends on those before it). Differentiable where m_i ≥ n_i and the rank is full.
    """
    matrices = validation.matrices("matrices", matrices)
    if not needs_gradient(*matrices):
        return tuple(call(ops.batched_qr.default, matrices))
    flat = BatchedQR.apply(*matrices)
    return list(flat[: len(matrices)]), list(flat[len(matrices) :])


def batched_svd(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Thin SVD of a list of matrices of different sizes in one call: A = U diag(s) Vh, s descending.

    Args: matrices: list of (m_i, n_i), float32 or float64.
    Returns: lists of U (m_i, k_i), s (k_i,), Vh (k_i, n_i), k_i = min(m_i, n_i). Differentiable where the singular
    values are distinct and non-zero; signs of singular vectors are not determined.
    """
    matrices = validation.matrices("matrices", matrices)
    if not needs_gradient(*matrices):
        return tuple(call(ops.batched_svd.default, matrices))
    flat, count = BatchedSVD.apply(*matrices), len(matrices)
    return list(flat[:count]), list(flat[count : 2 * count]), list(flat[2 * count :])
