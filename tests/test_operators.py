"""The operators as torch sees them: derivatives, opcheck, fakes, and torch.compile without graph breaks."""

import pytest
import torch
from functorch.compile import make_boxed_func
from problems import linear_operands, linear_tensors
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.utils._pytree import tree_map

import tucker_kernels as tk
from tucker_kernels import functions

OPS = torch.ops.tucker_kernels


def rand(*shape, last=False):
    """float64 of this shape, contiguous or channels-last."""
    tensor = torch.randn(*shape, dtype=torch.float64)
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor


def orthonormal(n, r):
    return torch.linalg.qr(rand(n, r))[0]


def conv_operands(last=False, out_factor=True, in_factor=True, bias=True):
    """(input, core, U_out, U_in, bias) with or without each optional one."""
    n_out, n_in = 5 if out_factor else 3, 4 if in_factor else 2
    return (
        rand(2, n_in, 6, 5, last=last),
        rand(3, 2, 3, 2),
        rand(5, 3) if out_factor else None,
        rand(4, 2) if in_factor else None,
        rand(n_out) if bias else None,
    )


GEOMETRY = ([2, 1], [1, 0], [1, 2])


def conv_backward_arguments(last, out_factor, in_factor, save, need, path="chain"):
    input, core, out_factor, in_factor, bias = conv_operands(last, out_factor, in_factor)
    y, z, t = OPS.tucker_conv_forward(input, core, out_factor, in_factor, bias, *GEOMETRY, path, save)
    return torch.randn_like(y), input, z, t, core, out_factor, in_factor, *GEOMETRY, need, path


def wgrad_arguments(last, out_basis, in_basis):
    input, core, out_factor, in_factor, _ = conv_operands(last)
    y = OPS.tucker_conv_forward(input, core, out_factor, in_factor, None, *GEOMETRY, "chain", False)[0]
    bases = (rand(5, 4) if out_basis else None, rand(4, 3) if in_basis else None)
    return input, torch.randn_like(y), *bases, [3, 2], *GEOMETRY


def linear_backward_arguments(rows, has_factor, need):
    input, core, factors, _ = linear_operands(rows, has_factor)
    y, z, t = OPS.tucker_linear_forward(input, core, factors, None, 2, True)
    return torch.randn_like(y), input, z, t, core, factors, 2, need


FACTORED = ([True] * 4, [True, False, False, True], [False, False, True, True], [True, True, False, False])
CUBE = (3, 4, 5, 2)
SAMPLES = {
    "mode_dot": lambda: [
        *((rand(*CUBE, last=last), rand(6, CUBE[mode]), mode, False) for last in (False, True) for mode in range(4)),
        (rand(*CUBE).permute(2, 0, 3, 1), rand(5, 6), 0, True),
        (rand(3, 4, 10)[..., ::2], rand(5, 6), -1, True),
        (rand(0, 4), rand(3, 4), 1, False),
        (rand(1, 4, 1), rand(3, 4), 1, False),
    ],
    "multi_mode_dot": lambda: [
        *((rand(*CUBE, last=last), [rand(6, 4), rand(1, 2)], [1, 3], False) for last in (False, True)),
        (rand(*CUBE), [rand(5, 7), rand(3, 2), rand(4, 9)], [2, 0, 1], True),
        (rand(3, 0), [rand(2, 3)], [0], False),
    ],
    "cross_gram": lambda: [
        *((rand(3, 4, 5, last=last), rand(3, 6, 5, last=last), 1) for last in (False, True)),
        (rand(3, 4), rand(7, 4), 0),
        (rand(3, 4), rand(3, 7), -1),
    ],
    "grouped_mode_dot": lambda: [
        ([rand(3, 4, 5), rand(6, 2)], [rand(4, 2), rand(5, 1), rand(6, 7)], [2, 1], [1, 2, 0], True),
        ([rand(3, 4, 5, last=True), rand(0, 2)], [rand(2, 5).T.contiguous().T, rand(3, 2)], [1, 1], [2, 1], False),
    ],
    "grouped_cross_gram": lambda: [
        ([rand(3, 4, 5), rand(6, 4).T], [rand(3, 2, 5), rand(4, 7)], [1, 1]),
        ([rand(3, 4, 5, last=True), rand(0, 2)], [rand(3, 4, 6), rand(0, 3)], [2, 1]),
    ],
    "tucker_conv_forward": lambda: [
        *(
            (*conv_operands(last, out_factor, in_factor), *GEOMETRY, path, save)
            for path in ("chain", "fused")
            for last in (False, True)
            for out_factor, in_factor in ((True, True), (False, True), (True, False), (False, False))
            for save in (False, True)
        ),
        (rand(2, 4, 9), rand(3, 2, 3), rand(5, 3), rand(4, 2), None, [2], [1], [1], "chain", True),
        (rand(2, 4, 9), rand(3, 2, 3), rand(5, 3), rand(4, 2), None, [2], [1], [1], "fused", True),
        (rand(0, 4, 6, 5), rand(3, 2, 3, 2), rand(5, 3), rand(4, 2), rand(5), *GEOMETRY, "chain", True),
    ],
    "tucker_conv_backward": lambda: [
        conv_backward_arguments(last, out_factor, in_factor, save, need, path)
        for path in ("chain", "fused")
        for last in (False, True)
        for out_factor, in_factor in ((True, True), (False, False))
        for save in (False, True)
        for need in (
            [True, True, out_factor, in_factor, True],
            [True, False, False, False, False],
            [False, False, False, in_factor, False],
            [False, True, False, False, False],
        )
    ],
    "rank_space_wgrad": lambda: (
        [
            wgrad_arguments(last, out_basis, in_basis)
            for last in (False, True)
            for out_basis, in_basis in ((True, True), (False, True), (True, False), (False, False))
        ]
        + [(*wgrad_arguments(False, True, True), known) for known in ([2, 1], [3, 2], [0, 1])]
    ),
    "tucker_linear_forward": lambda: [
        *((*linear_operands((2, 3), has), 2, save) for has in FACTORED for save in (False, True)),
        (*linear_operands((), [False] * 4, bias=False), 2, True),
        (*linear_operands((0,), [True] * 4), 2, True),
        (rand(10, 3).T, *linear_operands((3,), [True] * 4)[1:], 2, True),
        (rand(3, 6), rand(2, 4), [rand(5, 2), rand(6, 4)], None, 1, True),
    ],
    "tucker_linear_backward": lambda: [
        *(linear_backward_arguments((2, 3), has, [True] * 4 + has) for has in FACTORED),
        linear_backward_arguments((), [False] * 4, [True] * 4 + [False] * 4),
        linear_backward_arguments((0,), [True] * 4, [True] * 8),
        *(linear_backward_arguments((5,), [True] * 4, [i == only for i in range(8)]) for only in range(8)),
    ],
    "tangent_basis": lambda: [
        ([orthonormal(8, 3), orthonormal(5, 2)], [rand(8, 3), rand(5, 4)]),
        ([orthonormal(8, 3)], [rand(4, 8).T]),
    ],
    "hosvd_truncate": lambda: [
        ([rand(3, 4, 2), rand(5, 5)], [1, 1, 0, 1, 1], [0.1, 0.2], [1] * 5, [3, 4, 2, 5, 5], False),
        ([rand(3, 4, 2, 2, last=True)], [1, 1, 1, 1], [-1.0], [2, 2, 1, 1], [2, 2, 1, 1], True),
    ],
    "rotate_bases": lambda: [
        ([orthonormal(8, 5), orthonormal(6, 3)], [orthonormal(5, 5)[:, :2], orthonormal(3, 3)]),
        ([orthonormal(8, 4), rand(4, 7).T], [rand(2, 4).T, rand(4, 0)]),
    ],
    "gram_solve": lambda: [
        ([rand(3, 4, 2), rand(5, 6)], [1, 0], [rand(2, 4), rand(5, 7).T]),
        ([rand(3, 4, 2, 2, last=True)], [3], [rand(0, 2)]),
    ],
    "batched_qr": lambda: [([rand(5, 3), rand(2, 4), rand(4, 4).T],)],
    "batched_svd": lambda: [([rand(5, 3), rand(2, 4), rand(4, 4).T],)],
}
DIFFERENTIABLE = {"mode_dot", "multi_mode_dot", "cross_gram", "batched_qr", "batched_svd"}
CASES = [(name, i) for name, samples in SAMPLES.items() for i in range(len(samples()))]
every_case = pytest.mark.parametrize(("name", "index"), CASES)


def arguments(name, index, requires_grad=False):
    def prepared(x):
        return x.requires_grad_() if requires_grad and isinstance(x, torch.Tensor) else x

    return tree_map(prepared, SAMPLES[name]()[index])


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def test_every_operator_has_samples():
    names = {
        n.removeprefix("tucker_kernels::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("tucker_kernels::")
    }
    assert names == set(SAMPLES)


@every_case
def test_fakes_equal_real_results(name, index, backend):
    """Shape, dtype, stride and device of every result, for every layout of the input."""
    args = arguments(name, index)
    real = tensors(getattr(OPS, name)(*args))
    with FakeTensorMode() as mode:
        fake = tensors(
            getattr(OPS, name)(*tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, args))
        )
    assert len(real) == len(fake)
    for r, f in zip(real, fake):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    """All four checks: schema, autograd registration, fake, and tracing with dynamic shapes."""
    last = len(SAMPLES[name]()) - 1
    for index in sorted({0, last // 2, last}):
        args = arguments(
            name, index, requires_grad=name in DIFFERENTIABLE and name not in ("batched_qr", "batched_svd")
        )
        torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - DIFFERENTIABLE))
def test_operators_without_derivatives_refuse(name):
    args = arguments(name, 0, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable"):
        getattr(OPS, name)(*args)
    with torch.no_grad():
        assert not any(x.requires_grad for x in tensors(getattr(OPS, name)(*args)))


# ---- derivatives -------------------------------------------------------------------------------------------


def qr_products(*matrices):
    return [x for pair in zip(*tk.batched_qr(matrices)) for x in pair]


def svd_products(*matrices):
    """What of an SVD does not depend on the signs of the singular vectors."""
    found = []
    for U, s, Vh in zip(*tk.batched_svd(matrices)):
        found += [s, U @ U.T, Vh.T @ Vh, (U * s**2) @ Vh]
    return found


def detached(*tree):
    return tree_map(torch.Tensor.detach, tree)


WEIGHTED = {
    "ModeDot": lambda: (lambda x, m: functions.ModeDot.apply(x, m, 1, False), (rand(2, 3, 4), rand(5, 3))),
    "ModeDot_transposed": lambda: (lambda x, m: functions.ModeDot.apply(x, m, 1, True), (rand(2, 3, 4), rand(3, 5))),
    "CrossGram": lambda: (lambda a, b: functions.CrossGram.apply(a, b, 1), (rand(2, 3, 4), rand(2, 5, 4))),
    "EveryNth": lambda: (lambda x: functions.EveryNth.apply(x, [2, 3]), (rand(2, 3, 5, 4, last=True),)),
    "MultiModeDot": lambda: (
        lambda x, *m: functions.MultiModeDot.apply(x, [0, 2], False, *m),
        (rand(2, 3, 4), rand(3, 2), rand(2, 4)),
    ),
    "MultiModeDot_transposed": lambda: (
        lambda x, *m: functions.MultiModeDot.apply(x, [2, 0], True, *m),
        (rand(2, 3, 4), rand(4, 2), rand(2, 3)),
    ),
    "TuckerConv": lambda: (
        lambda *operands: functions.TuckerConv.apply(*operands, *GEOMETRY, "chain", True)[0],
        conv_operands(),
    ),
    "TuckerConv_recomputing": lambda: (
        lambda *operands: functions.TuckerConv.apply(*operands, *GEOMETRY, "chain", False)[0],
        conv_operands(),
    ),
    "TuckerConv_without_factors": lambda: (
        lambda x, core: functions.TuckerConv.apply(x, core, None, None, None, *GEOMETRY, "chain", True)[0],
        conv_operands(out_factor=False, in_factor=False)[:2],
    ),
    "TuckerConvBackward": lambda: (
        lambda grad, x, core, u, v: functions.TuckerConvBackward.apply(
            *(grad, x, x.new_empty(0), x.new_empty(0), core, u, v), *GEOMETRY, [True] * 5, "chain"
        ),
        conv_backward_arguments(False, True, True, False, [True] * 5)[:2] + conv_operands()[1:4],
    ),
    "TuckerLinear": lambda: (
        lambda x, c, b, *factors: functions.TuckerLinear.apply(x, c, b, 2, *factors)[0],
        linear_tensors((2,), [True] * 4),
    ),
    "TuckerLinear_with_few_factors": lambda: (
        lambda x, c, b, u, v: functions.TuckerLinear.apply(x, c, b, 2, None, u, v, None)[0],
        linear_tensors((2, 1), [False, True, True, False]),
    ),
    "TuckerLinearBackward": lambda: (
        lambda grad, x, c, *factors: functions.TuckerLinearBackward.apply(
            *(grad, 2, [True] * 8, x, *OPS.tucker_linear_forward(*detached(x, c, factors), None, 2, True)[1:], c),
            *factors,
        ),
        (rand(2, 12), *linear_tensors((2,), [True] * 4, bias=False)),
    ),
    "BatchedQR": lambda: (qr_products, (rand(5, 3), rand(2, 2))),
    "BatchedSVD": lambda: (svd_products, (rand(5, 3), rand(2, 4), rand(3, 3))),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_first_and_second_derivatives(case, backend):
    function, operands = WEIGHTED[case]()
    operands = [x.requires_grad_() for x in operands]
    assert gradcheck(function, operands)
    assert gradgradcheck(function, operands)


def test_every_function_is_checked():
    defined = {n for n, f in vars(functions).items() if isinstance(f, type) and f.__module__ == functions.__name__}
    defined.remove("Operator")  # their base
    assert defined == {case.split("_")[0] for case in WEIGHTED}


def test_gradcheck_notices_a_wrong_derivative():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, m):
            ctx.save_for_backward(m)
            return tk.mode_dot(x, m, 0)

        @staticmethod
        def backward(ctx, grad):
            (m,) = ctx.saved_tensors
            return tk.mode_dot(grad, m, 0), None  # without the transpose

    with pytest.raises(GradcheckError):
        gradcheck(Wrong.apply, (rand(3, 2).requires_grad_(), rand(3, 3)))


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_operators_called_directly_have_the_gradients_of_the_functions(name):
    args = arguments(name, 0, requires_grad=True)
    direct = tensors(getattr(OPS, name)(*args))
    public = {
        "mode_dot": functions.ModeDot.apply,
        "cross_gram": functions.CrossGram.apply,
        "multi_mode_dot": lambda x, m, modes, t: functions.MultiModeDot.apply(x, modes, t, *m),
        "batched_qr": lambda m: functions.BatchedQR.apply(*m[:1], *m[2:]),
        "batched_svd": lambda m: functions.BatchedSVD.apply(*m),
    }[name]
    if name == "batched_qr":  # a wide matrix has no derivative
        args = ([args[0][0], args[0][2]],)
        direct = tensors(OPS.batched_qr(*args))
        public = lambda m: functions.BatchedQR.apply(*m)  # noqa: E731
    weights = [torch.randn_like(x) for x in direct]
    operands = tensors(args)
    found = torch.autograd.grad(direct, operands, weights)
    expected = torch.autograd.grad(tensors(public(*args)), operands, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_second_derivative_where_one_operand_was_computed_from_another(backend):
    """Each operand's place has its own gradient: U_out = sin(U_in) must not be counted twice."""

    def chain(x, core, factor):
        return tk.tucker_conv(x, core, [factor.sin(), factor, None, None], path="chain")

    operands = [rand(1, 4, 4, 4), rand(2, 2, 3, 3), rand(4, 2)]
    operands = [x.requires_grad_() for x in operands]
    assert gradgradcheck(chain, operands)


# ---- torch.compile -----------------------------------------------------------------------------------------

COMPILED = {
    "mode_dot": lambda: (lambda x, m: tk.mode_dot(x, m, 1), (rand(2, 3, 4), rand(5, 3))),
    "multi_mode_dot": lambda: (
        lambda x, a, b: tk.multi_mode_dot(x, [a, None, b]),
        (rand(2, 3, 4), rand(3, 2), rand(2, 4)),
    ),
    "tucker_to_tensor": lambda: (lambda c, a, b: tk.tucker_to_tensor(c, [a, b]), (rand(2, 3), rand(4, 2), rand(5, 3))),
    "unfold": lambda: (lambda x: tk.unfold(x, 1) * 2, (rand(2, 3, 4),)),
    "fold": lambda: (lambda x: tk.fold(x, 1, (2, 3, 4)) * 2, (rand(3, 8),)),
    "tucker_conv_chain": lambda: (
        lambda x, c, u, v, b: tk.tucker_conv(x, c, [u, v, None, None], b, (2, 1), 1, 1, "chain"),
        conv_operands(),
    ),
    "tucker_conv_channels_last": lambda: (
        lambda x, c, u, v, b: tk.tucker_conv(x, c, [u, v, None, None], b, (2, 1), 1, 1, "chain"),
        conv_operands(last=True),
    ),
    "tucker_conv_reconstruct": lambda: (
        lambda x, c, u, v, b: tk.tucker_conv(x, c, [u, v, None, None], b, path="reconstruct"),
        conv_operands(),
    ),
    "tucker_conv_auto": lambda: (
        lambda x, c, u, v, b: tk.tucker_conv(x, c, [u, v, None, None], b),
        conv_operands(),
    ),
    "tucker_linear": lambda: (
        lambda x, c, u, v, b: tk.tucker_linear(x, c, [u, v], b, path="chain"),
        (rand(3, 6), rand(2, 2), rand(5, 2), rand(6, 2), rand(5)),
    ),
    "tucker_linear_tensorised": lambda: (
        lambda x, c, b, *factors: tk.tucker_linear(x, c, factors, b, 2, path="chain"),
        linear_tensors((3,), [True] * 4),
    ),
    "batched_qr": lambda: (lambda a, b: sum(x.sum() for x in qr_products(a, b)), (rand(5, 3), rand(2, 2))),
    "batched_svd": lambda: (lambda a, b: sum(x.sum() for x in svd_products(a, b)), (rand(5, 3), rand(2, 4))),
}


# Functions without a derivative.
COMPILED_FORWARD = {
    "tangent_basis": lambda: (lambda u, d: tk.tangent_basis([u], [d])[0][0], (orthonormal(7, 2), rand(7, 3))),
    "hosvd_truncate": lambda: (lambda c: tk.hosvd_truncate([c], ranks=(2, 2, 2))[0][0], (rand(4, 3, 5),)),
    "rotate_bases": lambda: (lambda b, p: tk.rotate_bases([b], [p])[0], (orthonormal(7, 4), orthonormal(4, 2))),
    "gram_solve": lambda: (lambda c, b: tk.gram_solve([c], [1], [b])[0], (rand(3, 4, 5), rand(2, 4))),
    "tucker_conv_core_grad": lambda: (
        lambda x, dy, u, v: tk.tucker_conv_core_grad(x, dy, [u, v, None, None], (3, 3), known=(1, 1)),
        (rand(2, 4, 6, 6), rand(2, 5, 4, 4), rand(5, 2), rand(4, 3)),
    ),
    "tucker_linear_core_grad": lambda: (
        lambda x, dy, u, v: tk.tucker_linear_core_grad(x, dy, [u, v], (5, 4)),
        (rand(6, 4), rand(6, 5), rand(5, 2), rand(4, 3)),
    ),
}


@pytest.mark.parametrize("case", [*COMPILED, *COMPILED_FORWARD])
def test_compiled_for_inference(case):
    function, operands = (COMPILED | COMPILED_FORWARD)[case]()
    torch._dynamo.reset()
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(actual, function(*operands), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_without_graph_breaks(case):
    """Same values and gradients as eager, one graph, and none compiled anew for other values of the same shapes."""
    function, operands = COMPILED[case]()
    operands = [x.requires_grad_() for x in operands]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for scale in (1.0, 0.5):
        given = [(scale * x).detach().requires_grad_() for x in operands]
        expected, actual = function(*given), compiled(*given)
        weight = torch.randn_like(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        assert actual.stride() == expected.stride()
        for a, e in zip(torch.autograd.grad(actual, given, weight), torch.autograd.grad(expected, given, weight)):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("case", ["tucker_conv_chain", "tucker_conv_channels_last", "tucker_linear", "multi_mode_dot"])
def test_compiled_with_inductor(case):
    function, operands = COMPILED[case]()
    operands = [x.requires_grad_() for x in operands]
    torch._dynamo.reset()
    expected, actual = function(*operands), torch.compile(function, fullgraph=True)(*operands)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(torch.autograd.grad(actual, operands, weight), torch.autograd.grad(expected, operands, weight)):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


def test_changing_batch_sizes_compile_once_more():
    """The second batch size makes the batch dynamic; no further one compiles again."""
    function, (x, *operands) = COMPILED["tucker_conv_chain"]()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8):
        x = rand(batch, 4, 6, 5).requires_grad_()
        torch.testing.assert_close(compiled(x, *operands), function(x, *operands), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 2


def test_changing_ranks_compile_once_more():
    """Ranks that change during training, as those of a rank-adaptive step do, are dynamic from the second value on."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda c, u, v: tk.tucker_to_tensor(c, [u, v]), fullgraph=True, backend=counter)
    for r in (3, 4, 5, 7):
        operands = rand(r, r + 1), rand(9, r), rand(8, r + 1)
        torch.testing.assert_close(compiled(*operands), torch.einsum("ab,ia,jb->ij", *operands), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 2


def test_the_compiled_backward_pass_is_the_fused_one():
    """Tracing must not take the differentiable detour of a second derivative."""
    called = []

    def backend(graph, inputs):
        def record(graph, inputs):
            called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph, inputs)

    function, operands = COMPILED["tucker_conv_chain"]()
    operands = [x.requires_grad_() for x in operands]
    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*operands).sum().backward()
    assert called.count("tucker_kernels.tucker_conv_forward.default") == 1
    assert called.count("tucker_kernels.tucker_conv_backward.default") == 1
    assert not any("aten.convolution" in name for name in called)


def test_operators_called_directly_are_differentiated_when_compiled():
    def function(x, m):
        return OPS.mode_dot(x, m, 1, False).sin()

    operands = [rand(2, 3, 4).requires_grad_(), rand(5, 3).requires_grad_()]
    torch._dynamo.reset()
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*operands).sum()
    for a, e in zip(torch.autograd.grad(actual, operands), torch.autograd.grad(function(*operands).sum(), operands)):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
