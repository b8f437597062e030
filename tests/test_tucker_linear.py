"""tucker_linear against F.linear with the dense weight in float64, and its core gradient against autograd."""

import dataclasses
import itertools

import oracles
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LINEARS
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tucker_kernels as tk
from tucker_kernels import cost_model
from tucker_kernels.library import ops
from tucker_kernels.linear import new_blocks

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


def kernels_of(problem, dtype, need=None):
    """Results of the two operators behind a tensorised layer: y and the gradients, as a flat list."""
    input, core, factors, bias = problem.operands(dtype)
    y, z, t = ops.tucker_linear_forward(input, core, factors, bias, len(problem.outer), True)
    need = need or [True] * (4 + len(factors))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    *found, d_factors = ops.tucker_linear_backward(grad, input, z, t, core, factors, len(problem.outer), need)
    return [y, *found, *d_factors]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sizes", itertools.product((0, 3), (0, 2), (0, 2), (0, 4)), ids=str)
def test_sizes_of_zero(sizes, path, backend):
    n_out, r_out, r_in, n_in = sizes
    shapes = (5, n_in), (r_out, r_in), (n_out, r_out), (n_in, r_in), (n_out,)
    operands = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def dense(x, core, U, V, bias):
        return x @ (U @ core @ V.T).T + bias

    x, core, U, V, bias = operands
    y = tk.tucker_linear(x, core, [U, V], bias, path=path)
    assert_close(y, dense(*operands), "tucker_linear")
    grad = torch.randn_like(y)
    wanted = oracles.gradients(dense, operands, grad)
    for actual, expected in zip(torch.autograd.grad(y, operands, grad), wanted):
        assert_close(actual, expected, "tucker_linear_backward")


@linear_problems
def test_only_the_gradients_asked_for_are_computed(problem, backend):
    """Each alone equals its part of all of them; the others are empty."""
    torch.manual_seed(0)
    every = kernels_of(problem, torch.float64)
    for wanted in range(1, len(every)):
        torch.manual_seed(0)
        found = kernels_of(problem, torch.float64, [i == wanted for i in range(1, len(every))])
        expected = [x if i in (0, wanted) else x.new_empty(0) for i, x in enumerate(every)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["tensorised_wide", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(name, dtype):
    problem = dataclasses.replace(BY_NAME[name], rows=(700,))
    alone = kernels_of(problem, dtype)
    for count in (2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(kernels_of(problem, dtype), alone, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_of_either_side(data):
    """Modes of any number and size, 0 and 1 among them, with and without factors, against the reference in float64."""
    modes = st.lists(st.tuples(st.integers(0, 12), st.one_of(st.none(), st.integers(0, 9))), min_size=1, max_size=4)
    outer, inner = data.draw(modes), data.draw(modes)
    problem = problems.Linear(
        "drawn",
        outer=tuple(n for n, _ in outer),
        inner=tuple(n for n, _ in inner),
        ranks=tuple(r for _, r in outer + inner),
        rows=(data.draw(st.integers(0, 40)),),
        bias=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    input, core, factors, bias = problem.operands(dtype)
    grad = torch.randn(*problem.rows, torch.Size(problem.outer).numel()).to(dtype)
    need = [True, True, bias is not None, True, *(factor is not None for factor in factors)]

    def results(wide):
        x, c, us, b, dy = tree_map_only(torch.Tensor, wide, (input, core, factors, bias, grad))
        y, z, t = ops.tucker_linear_forward(x, c, us, b, len(outer), True)
        *found, d_factors = ops.tucker_linear_backward(dy, x, z, t, c, us, len(outer), need)
        return [y, *found, *d_factors]

    found = results(lambda x: x)
    with tk.use_backend("reference"):
        expected = results(oracles.wide)
        # Cancellation: what the same sums of absolute values come to is what their errors are relative to.
        magnitude = results(lambda x: oracles.wide(x).abs())
    for actual, wanted, size in zip(found, expected, magnitude, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, "tucker_linear_backward", scale=float(size.max()) if size.numel() else 1.0)


class Recorded(TorchDispatchMode):
    """The names of the operators called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


# 512 × 512 as (16·32) × (16·32). At ranks 12 and 24 a row costs 114 thousand products mode by mode, 378 thousand with
# Kronecker products of the factors, and 262 thousand in the dense layer.
@pytest.mark.parametrize(
    ("ranks", "rows", "whole"), [((12, 24), 4096, False), ((16, 32), 4096, True), ((16, 32), 1, False)]
)
def test_auto_counts_products_mode_by_mode(ranks, rows, whole):
    core, factors = torch.randn(ranks * 2), [torch.randn(n, r) for n, r in zip((16, 32) * 2, ranks * 2)]
    with Recorded() as recorded:
        tk.tucker_linear(torch.randn(rows, 512), core, factors, out_modes=2)
    assert ("aten::linear" in recorded.names or "aten::mm" in recorded.names) == whole
    assert ("tucker_kernels::tucker_linear_forward" in recorded.names) != whole


# A row of 64 × 64 at rank 16 takes 2304 multiply-adds.
@pytest.mark.parametrize(
    ("rows", "dtype", "one_call"),
    [(7281, torch.float32, False), (7282, torch.float32, True), (7282, torch.bfloat16, False)],
)
def test_large_layers_of_two_modes_are_one_call(rows, dtype, one_call):
    problem = problems.Linear("two", outer=(64,), inner=(64,), ranks=(16, 16), rows=(rows,))
    input, core, factors, bias = problem.operands(dtype)
    with Recorded() as recorded:
        y = tk.tucker_linear(input, core, factors, bias, path="chain")
    assert ("tucker_kernels::tucker_linear_forward" in recorded.names) == one_call
    assert_close(y, oracles.linear(input, core, factors, bias, 1), "tucker_linear")


def cheapest(before, after, factored):
    """Multiply-adds of a chain of products from these sizes to those, the least over all orders."""

    def products(order):
        sizes, total = list(before), 0
        for i in order:
            total += torch.Size(sizes).numel() * after[i]
            sizes[i] = after[i]
        return total

    return min(map(products, itertools.permutations([i for i, has_factor in enumerate(factored) if has_factor])))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.integers(1, 30)), min_size=2, max_size=5), st.data())
def test_products_are_counted_in_the_cheapest_order(modes, data):
    m = data.draw(st.integers(1, len(modes) - 1))
    sizes, factored = [n for n, _, _ in modes], [has_factor for _, has_factor, _ in modes]
    ranks = [r if has_factor else n for n, has_factor, r in modes]
    row, weight = cost_model.linear_products(tuple((n, r if h else None) for n, h, r in modes), m)
    assert weight == cheapest(ranks, sizes, factored)
    expected = cheapest(sizes[m:], ranks[m:], factored[m:]) + cheapest(ranks[:m], sizes[:m], factored[:m])
    assert row == expected + torch.Size(ranks).numel()


@pytest.mark.parametrize("path", PATHS)
def test_input_that_is_not_contiguous(path, backend):
    _, core, factors, bias = BY_NAME["matrix"].operands()
    for input in (torch.randn(6, 4, dtype=torch.float64).T, torch.randn(4, 12, dtype=torch.float64)[:, ::2]):
        y = tk.tucker_linear(input, core, factors, bias, path=path)
        assert_close(y, oracles.linear(input, core, factors, bias, 1), "tucker_linear")


def test_what_is_kept_for_the_backward_pass_has_no_gradient(backend):
    problem = BY_NAME["tensorised"]
    input, core, factors, bias = problem.operands()
    operands = [x.requires_grad_() for x in (input, core, bias)]
    found = tk.functions.TuckerLinear.apply(*operands, len(problem.outer), *factors)
    assert [x.requires_grad for x in found] == [True, False, False]


@linear_problems
@pytest.mark.parametrize("late", list(itertools.product((False, True), repeat=2)), ids=str)
def test_core_gradient_is_the_dense_one_in_the_bases(problem, late, backend, monkeypatch):
    monkeypatch.setattr(cost_model, "project_linear_gradient", lambda *layer: late)
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


@pytest.mark.parametrize(("a_out", "a_in"), [(5, 4), (3, 4), (5, 2), (8, 6), (3, 2)])
def test_new_blocks_are_those_of_the_core_gradient(a_out, a_in, backend):
    """In bases whose leading columns, 3 and 2, are those of a layer; of which any number may be new."""
    x, dy = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    U, V = torch.randn(8, a_out, dtype=torch.float64), torch.randn(6, a_in, dtype=torch.float64)
    found = new_blocks(x, dy, [U, V], (dy.flatten(0, 1) @ U[:, :3], x.flatten(0, 1) @ V[:, :2]))
    expected = U.T @ dy.flatten(0, 1).T @ x.flatten(0, 1) @ V
    expected[:3, :2] = 0
    assert_close(found, expected, "core_grad")


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("create_graph", [False, True])
def test_receivers_get_what_the_backward_pass_projects(count, create_graph, backend):
    input, core, factors, bias = BY_NAME["matrix"].operands()
    operands = [x.requires_grad_() for x in (input, core, bias, *factors)]
    y = tk.functions.TuckerLinear.apply(*operands[:3], 1, *factors)[0]
    received, grad = [], torch.randn_like(y)
    for _ in range(count):
        y.grad_fn.receivers.append(lambda *found: received.append(found))
    torch.autograd.grad(y, operands, grad, create_graph=create_graph)
    assert len(received) == count
    for dy, dt, z in received:
        assert torch.equal(dy, grad)
        assert_close(dt, grad.reshape(-1, grad.shape[-1]) @ factors[0].detach(), "tucker_linear_backward")
        assert_close(z, input.detach().reshape(-1, input.shape[-1]) @ factors[1].detach(), "tucker_linear_backward")
        assert not dt.requires_grad


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
