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
