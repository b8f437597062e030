"""What is expected, in float64, from torch.einsum and torch.nn.functional: nothing of the code under test."""

import string

import torch
import torch.nn.functional as F


def wide(tensor):
    return None if tensor is None else tensor.detach().double()


def mode_dot(tensor, matrix, mode, transpose=False):
    letters = string.ascii_lowercase[: tensor.ndim]
    result = letters.replace(letters[mode], "z")
    pair = f"{letters[mode]}z" if transpose else f"z{letters[mode]}"
    return torch.einsum(f"{letters},{pair}->{result}", tensor.double(), matrix.double())


def multi_mode_dot(tensor, matrices, modes, transpose=False):
    for matrix, mode in zip(matrices, modes):
        tensor = mode_dot(tensor, matrix, mode, transpose)
    return tensor


def cross_gram(a, b, mode):
    letters = string.ascii_lowercase[: a.ndim]
    other = letters.replace(letters[mode], "z")
    return torch.einsum(f"{letters},{other}->{letters[mode]}z", a.double(), b.double())


def tucker_to_tensor(core, factors):
    """C ×_1 U_1 … ×_d U_d in one einsum; differentiable."""
    small, big = string.ascii_lowercase[: core.ndim], string.ascii_uppercase[: core.ndim]
    terms, operands, result = [small], [core.double()], ""
    for s, b, factor in zip(small, big, factors):
        if factor is None:
            result += s
        else:
            result += b
            terms.append(b + s)
            operands.append(factor.double())
    return torch.einsum(",".join(terms) + "->" + result, *operands)


def conv(input, core, factors, bias, stride, padding, dilation):
    """F.conv*d in float64 with the dense weight; differentiable."""
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[core.ndim]
    weight = tucker_to_tensor(core, factors)
    return function(input.double(), weight, None if bias is None else bias.double(), stride, padding, dilation)


def linear(input, core, factors, bias, out_modes):
    """F.linear in float64 with the dense weight seen as a matrix; differentiable."""
    weight = tucker_to_tensor(core, factors)
    rows = weight.shape[:out_modes].numel()
    return F.linear(input.double(), weight.reshape(rows, -1), None if bias is None else bias.double())


def gradients(function, operands, grad_output):
    """d⟨grad_output, function(*operands)⟩ for every operand that is a tensor, in float64; None stays None."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    y = function(*leaves)
    tensors = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(y, tensors, grad_output.double(), allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


def unfold(tensor, mode):
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def multiply(tensor, matrices, skip=None):
    for mode, matrix in enumerate(matrices):
        if mode != skip:
            tensor = torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


def tangent_projection(Z, core, factors):
    """P_T Z = Z ×_j U_jU_jᵀ + Σ_i Ten_i[(I − U_iU_iᵀ) Mat_i(Z ×_{j≠i} U_jᵀ) Q_iQ_iᵀ] ×_{j≠i} U_j."""
    transposes = [U.T for U in factors]
    result = multiply(multiply(Z, transposes), factors)
    for i, U in enumerate(factors):
        M = unfold(multiply(Z, transposes, skip=i), i)
        Q = torch.linalg.qr(unfold(core, i).T)[0]
        inner = (M - U @ (U.T @ M)) @ Q @ Q.T
        shape = [U.shape[0] if j == i else core.shape[j] for j in range(core.ndim)]
        rest = [s for j, s in enumerate(shape) if j != i]
        result = result + multiply(inner.reshape(shape[i], *rest).movedim(0, i), factors, skip=i)
    return result
