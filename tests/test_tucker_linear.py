"""tucker_linear against F.linear with the dense weight in float64, and its core gradient against autograd."""

import oracles
import pytest
import torch
from problems import LINEARS
from tolerances import assert_close

import tucker_kernels as tk

PATHS = ("auto", "chain", "reconstruct", "fused")
BY_NAME = {problem.name: problem for problem in LINEARS}
linear_problems = pytest.mark.parametrize("problem", LINEARS, ids=str)


def check_against_oracle(problem, dtype, path, function=tk.tucker_linear):
    input, core, factors, bias = problem.operands(dtype)
    if path == "fused" and core.ndim > 2:
        with pytest.raises(ValueError, match="takes two modes"):
            function(input, core, factors, bias, len(problem.outer), path)
        return
    y = function(input, core, factors, bias, len(problem.outer), path)
    assert y.dtype == dtype
    assert_close(y, oracles.linear(input, core, factors, bias, len(problem.outer)), "tucker_linear")


@linear_problems
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_equals_the_dense_layer(problem, path, dtype, backend):
    check_against_oracle(problem, dtype, path)


@pytest.mark.parametrize(
    ("problem", "path"),
    [(problem, path) for problem in LINEARS for path in PATHS if path != "fused" or len(problem.ranks) == 2],
    ids=str,
)
def test_gradients_equal_those_of_the_dense_layer(problem, path, backend):
    input, core, factors, bias = problem.operands()
    operands = [x if x is None else x.requires_grad_() for x in (input, core, bias, *factors)]
    y = tk.tucker_linear(input, core, factors, bias, len(problem.outer), path)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, [x for x in operands if x is not None], grad)
    expected = oracles.gradients(
        lambda input, core, bias, *factors: oracles.linear(input, core, factors, bias, len(problem.outer)),
        operands,
        grad,
    )
    for actual, wanted in zip(found, [x for x in expected if x is not None], strict=True):
        assert_close(actual, wanted, "tucker_linear_backward")


@pytest.mark.parametrize("path", PATHS)
def test_input_that_is_not_contiguous(path, backend):
    _, core, factors, bias = BY_NAME["matrix"].operands()
    for input in (torch.randn(6, 4, dtype=torch.float64).T, torch.randn(4, 12, dtype=torch.float64)[:, ::2]):
        y = tk.tucker_linear(input, core, factors, bias, path=path)
        assert_close(y, oracles.linear(input, core, factors, bias, 1), "tucker_linear")


@linear_problems
def test_core_gradient_is_the_dense_one_in_the_bases(problem, backend):
    input, core, factors, _ = problem.operands()
    full = oracles.tucker_to_tensor(core, factors)
    grad = torch.randn(*problem.rows, torch.Size(problem.outer).numel(), dtype=torch.float64)
    (dense,) = oracles.gradients(
        lambda w: oracles.linear(input, w, [None] * w.ndim, None, len(problem.outer)), [full], grad
    )
    expected = dense
    for i, factor in enumerate(factors):
        if factor is not None:
            expected = oracles.mode_dot(expected, factor, i, transpose=True)
    actual = tk.tucker_linear_core_grad(input, grad, factors, full.shape, len(problem.outer))
    assert_close(actual, expected, "core_grad", scale=max(float(dense.abs().max()), 1.0))


MISTAKES = {
    "factors swapped": lambda x, c, f, b, m, path: tk.tucker_linear(x, c.flip(0), f, b, m, path),
    "no bias": lambda x, c, f, b, m, path: tk.tucker_linear(x, c, f, None, m, path),
    "input modes permuted": lambda x, c, f, b, m, path: tk.tucker_linear(
        x.reshape(4, 2, 5).transpose(1, 2).reshape(4, 10), c, f, b, m, path
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("path", ["chain", "reconstruct"])
def test_the_oracle_rejects(mistake, path):
    with pytest.raises(AssertionError):
        check_against_oracle(BY_NAME["tensorised"], torch.float64, path, MISTAKES[mistake])
