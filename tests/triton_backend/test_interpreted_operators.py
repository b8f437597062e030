"""The registered operators, called as a user calls them, through the interpreter; and proof that the checks bite."""

import logging
import os
import sys
from pathlib import Path

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from tolerances import assert_close

import tucker_kernels
from tucker_kernels import reference
from tucker_kernels.dispatch import _log_refusal
from tucker_kernels.functions import TuckerConv
from tucker_kernels.triton import configs, costs, operators
from tucker_kernels.triton import project_accumulate as project_module
from tucker_kernels.triton import rank_space_wgrad as wgrad_module
from tucker_kernels.triton import tucker_core_expand as core_module
from tucker_kernels.triton import tucker_linear as linear_module

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import triton_kernels as bench

GEOMETRY = ([2, 1], [1, 2], [1, 2])


@pytest.fixture(autouse=True)
def _triton():
    with tucker_kernels.use_backend("triton"):
        yield


def _layer(dtype, memory_format=torch.channels_last, seed=0):
    torch.manual_seed(seed)
    shapes = [(2, 20, 9, 8), (12, 9, 3, 3), (30, 12), (20, 9), (30,)]
    operands = [(torch.randn(s) / max(s[1:], default=1) ** 0.5).to(dtype) for s in shapes]
    operands[0] = operands[0].contiguous(memory_format=memory_format)
    return operands


def _exact(operands):
    return [o.double() for o in operands]


@pytest.mark.parametrize(
    ("dtype", "memory_format", "save"),
    [
        (torch.float32, torch.channels_last, False),
        (torch.float32, torch.contiguous_format, True),
        (torch.bfloat16, torch.channels_last, True),
    ],
)
def test_convolution_operators_agree_with_the_reference(dtype, memory_format, save):
    operands = _layer(dtype, memory_format)
    forward = operators.tucker_conv_forward(*operands, *GEOMETRY, "fused", save)
    expected = reference.tucker_conv_forward(*_exact(operands), *GEOMETRY, "fused", save)
    for got, want in zip(forward, expected):
        assert_close(got, want, "tucker_conv")
    assert reference.format_of(forward[0]) == reference.format_of(operands[0])
    x, core, out_factor, in_factor, _ = operands
    grad = torch.randn(forward[0].shape).to(dtype).contiguous(memory_format=memory_format)
    need = [True] * 5
    args = (core, out_factor, in_factor)
    found = operators.tucker_conv_backward(grad, x, *forward[1:], *args, *GEOMETRY, need, "fused")
    exact = _exact([grad, x]), [f.double() for f in expected[1:]], _exact(args)
    wanted = reference.tucker_conv_backward(*exact[0], *exact[1], *exact[2], *GEOMETRY, need, "fused")
    for got, want in zip(found, wanted):
        assert_close(got, want, "tucker_conv_backward")
    assert reference.format_of(found[0]) == reference.format_of(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", [True, False])
def test_a_linear_layer_is_one_launch(dtype, save, monkeypatch):
    launched = []
    monkeypatch.setattr(core_module, "launch", lambda *_: launched.append("pair"))
    torch.manual_seed(0)
    x, core, u, v, bias = (
        (torch.randn(s) / s[-1] ** 0.5).to(dtype) for s in ((5, 20), (12, 9), (30, 12), (20, 9), (30,))
    )
    exact = [o.double().requires_grad_() for o in (x, core, u, v, bias)]
    expected = exact[0] @ exact[3] @ exact[1].T @ exact[2].T + exact[4]
    mine = [o.requires_grad_(save) for o in (x, core, u, v, bias)]
    y = tucker_kernels.tucker_linear(mine[0], mine[1], [mine[2], mine[3]], mine[4], path="fused")
    assert not launched
    assert_close(y.detach(), expected.detach(), "tucker_linear")
    monkeypatch.undo()
    if save:
        y.float().square().sum().backward()
        expected.square().sum().backward()
        for got, want in zip(mine, exact):
            assert_close(got.grad, want.grad, "tucker_linear_backward")


@pytest.mark.parametrize("only", range(5))
def test_only_what_is_needed_comes_back(only):
    operands = _layer(torch.float32)
    y, z, t = operators.tucker_conv_forward(*operands, *GEOMETRY, "fused", True)
    need = [i == only for i in range(5)]
    args = (torch.ones_like(y), operands[0], z, t, *operands[1:4], *GEOMETRY, need, "fused")
    found = operators.tucker_conv_backward(*args)
    wanted = reference.tucker_conv_backward(*args)
    for got, want in zip(found, wanted):
        assert_close(got, want.double(), "tucker_conv_backward")


def test_the_differentiable_function_reaches_the_kernels(monkeypatch):
    called = []
    original = operators.tucker_conv_forward
    monkeypatch.setattr(operators, "tucker_conv_forward", lambda *a: called.append(1) or original(*a))
    x, core, out_factor, in_factor, bias = (o.requires_grad_() for o in _layer(torch.float32))
    y = TuckerConv.apply(x, core, out_factor, in_factor, bias, *GEOMETRY, "fused", True)[0]
    y.square().sum().backward()
    assert called
    found = [o.grad for o in (x, core, out_factor, in_factor, bias)]
    exact = [o.detach().double().requires_grad_() for o in (x, core, out_factor, in_factor, bias)]
    reference.tucker_conv_forward(*exact, *GEOMETRY, "chain", False)[0].square().sum().backward()
    for got, want in zip(found, exact):
        assert_close(got, want.grad, "tucker_conv_backward")


@pytest.mark.parametrize("which", ["both", "out", "in", "none"])
def test_rank_space_wgrad_operator(which):
    x, core, out_factor, in_factor, _ = _layer(torch.float32)
    grad = torch.randn_like(operators.tucker_conv_forward(x, core, out_factor, in_factor, None, *GEOMETRY, "", 0)[0])
    bases = (out_factor if which in ("both", "out") else None, in_factor if which in ("both", "in") else None)
    found = torch.ops.tucker_kernels.rank_space_wgrad(x, grad, *bases, [3, 3], *GEOMETRY)
    exact = [None if b is None else b.double() for b in bases]
    wanted = reference.rank_space_wgrad(x.double(), grad.double(), *exact, [3, 3], *GEOMETRY)
    assert_close(found, wanted, "core_grad")
    r_out, r_in = wanted.shape[:2]
    for known in ((3, 2), (r_out, 5), (4, r_in), (r_out, r_in), (0, 4)):
        wanted_part = wanted.clone()
        wanted_part[: known[0], : known[1]] = 0
        found = torch.ops.tucker_kernels.rank_space_wgrad(x, grad, *bases, [3, 3], *GEOMETRY, known)
        assert_close(found, wanted_part, "core_grad", scale=float(wanted.abs().max()))


def test_augmented_core_gradient():
    x, core, out_factor, in_factor, _ = _layer(torch.float32)
    y, z, _ = operators.tucker_conv_forward(x, core, out_factor, in_factor, None, *GEOMETRY, "fused", True)
    grad = torch.randn_like(y)
    v_out, v_in = torch.randn(30, 7), torch.randn(20, 5)
    dt = torch.einsum("bnhw,nr->brhw", grad, out_factor)
    known = reference.rank_space_wgrad(x, grad, out_factor, in_factor, [3, 3], *GEOMETRY)
    found = operators.augmented_core_grad(x, grad, z, dt, v_out, v_in, known, *GEOMETRY)
    bases = [torch.cat(pair, 1).double() for pair in ((out_factor, v_out), (in_factor, v_in))]
    assert_close(found, reference.rank_space_wgrad(x.double(), grad.double(), *bases, [3, 3], *GEOMETRY), "core_grad")


def test_refusals_are_logged_and_the_next_back_end_runs(caplog):
    operands = _layer(torch.float64)
    _log_refusal.cache_clear()
    with caplog.at_level(logging.INFO, "tucker_kernels"):
        y, *_ = torch.ops.tucker_kernels.tucker_conv_forward(*operands, *GEOMETRY, "fused", True)
    assert "tucker_conv_forward does not go to back end triton: torch.float64" in caplog.text
    assert_close(y, reference.tucker_conv_forward(*operands, *GEOMETRY, "chain", True)[0], "tucker_conv")


# ---- the checks themselves --------------------------------------------------------------------------------


@triton.jit
def _copy(source, target, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(target + i, tl.load(source + i))


@pytest.mark.parametrize(("sizes", "kind"), [((1000, 1024), "load"), ((1024, 1000), "store")])
def test_an_access_outside_the_tensors_is_found(sizes, kind):
    source, target = (torch.zeros(n) for n in sizes)
    with pytest.raises(interpreter.InterpreterError, match=f"{kind} of 24 elements outside"):
        _copy[(1,)](source, target, SIZE=1024)


def test_a_wrong_tap_is_found():
    """The oracle of the convolution fails on a kernel with the window turned round."""
    x, core, *rest = _layer(torch.float32)
    wrong = operators.tucker_conv_forward(x, core.flip(3), *rest, *GEOMETRY, "fused", True)[0]
    right = reference.tucker_conv_forward(*_exact([x, core, *rest]), *GEOMETRY, "fused", True)[0]
    with pytest.raises(AssertionError, match="error"):
        assert_close(wrong, right, "tucker_conv")


@pytest.mark.parametrize("wide", [True, False])
def test_offsets_beyond_31_bits(wide, monkeypatch):
    """The last program of a 4 GiB image, of which only the pages it touches exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        image = torch.empty(2**11 + 1, 64, 128, 128, dtype=torch.bfloat16, memory_format=torch.channels_last)
        assert image.numel() > 2**31
        torch.manual_seed(0)
        image[-1, :, -8:] = torch.randn(64, 8, 128).bfloat16()
        core, factor = (torch.randn(16, 64, 3, 3) / 24).bfloat16(), (torch.randn(8, 16) / 4).bfloat16()
        monkeypatch.setattr(core_module, "needs_wide", lambda *_: wide)
        run = lambda: core_module.tucker_core_expand(image, core, factor, padding=(1, 1))[0]  # noqa: E731
        with interpreter.last_program_only():
            if not wide:
                with pytest.raises(interpreter.InterpreterError, match="outside every tensor"):
                    run()
                return
            y = run()[-1:, :, -1, 64:]
        mid = torch.nn.functional.conv2d(image[-1:, :, -4:].double(), core.double(), padding=1).bfloat16().double()
        assert_close(y, torch.einsum("bahw,na->bnhw", mid, factor.double())[:, :, -1, 64:], "tucker_core_expand")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


# ---- the cost table ---------------------------------------------------------------------------------------


def _check_cost(count, cost):
    assert count.flops == cost.flops
    assert count.read == cost.read
    assert count.written == cost.written
    assert count.stored == cost.written, "an element was stored twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_costs_are_what_the_kernels_do(dtype, monkeypatch):
    """Sizes that fill their tiles and runs, so that no operation is padding, and a window without border."""
    monkeypatch.setattr(configs, "PROGRAMS", 4)
    size = torch.empty(0, dtype=dtype).element_size()
    B, H, W, r, n = 2, 16, 16, 32, 64
    z = torch.randn(B, r, H, W).to(dtype, memory_format=torch.channels_last)
    core, factor = torch.randn(r, r, 1, 1).to(dtype), torch.randn(n, r).to(dtype)
    with interpreter.counted() as count:
        core_module.tucker_core_expand(z, core, factor, save_intermediate=True)
    _check_cost(count, costs.tucker_core_expand(B * H * W, B * H * W, n, r, r, (1, 1), size, save=True))
    a, basis, t = torch.randn(512, n).to(dtype), torch.randn(n, r).to(dtype), torch.randn(512, r).to(dtype)
    kind = "half" if dtype == torch.bfloat16 else "tf32x3"
    runs = configs.pixel_splits(512, configs.project_accumulate(kind, n, r)["BM"])[1]
    with interpreter.counted() as count:
        project_module.project_accumulate(a, basis, t)
    _check_cost(count, costs.project_accumulate(512, n, r, r, size, runs=runs))
    z, d = (torch.randn(B, r, H, W).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    runs = configs.pixel_splits(B * H * W, configs.rank_space_wgrad(kind, r, r)["BM"])[1]
    with interpreter.counted() as count:
        wgrad_module.rank_space_wgrad(z, d, (1, 1))
    _check_cost(count, costs.rank_space_wgrad(B * H * W, B * H * W, r, r, (1, 1), size, runs=runs))
    x, u, v, c = (torch.randn(s).to(dtype) for s in ((512, n), (n, r), (n, r), (r, r)))
    with interpreter.counted() as count:
        linear_module.tucker_linear(x, c, u, v, save_intermediate=True)
    _check_cost(count, costs.tucker_linear(512, n, n, r, r, size, save=True))


# ---- the benchmark, on a small layer ----------------------------------------------------------------------

LAYER = bench.Layer("tiny", 2, 16, 6)


@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_the_benchmark_gate_passes_right_results(precision):
    error, result = bench.gate(LAYER, precision, "cpu")
    assert 0 < error <= 1, result


def test_the_benchmark_gate_stops_wrong_results(monkeypatch):
    right = operators.tucker_conv_backward

    def wrong(*args, **options):
        dx, *rest = right(*args, **options)
        return dx.roll(1, 2), *rest

    monkeypatch.setattr(operators, "tucker_conv_backward", wrong)
    error, result = bench.gate(LAYER, "bf16", "cpu")
    assert error > 1
    assert result == "dx"


def test_the_benchmark_rivals_compute_the_same():
    given = bench.operands(LAYER, torch.float32, "cpu")
    exact = bench.run_chain(*(t.double() for t in given))
    for run in (bench.run_ours(*given, None), bench.run_chain(*given), bench.run_dense(*given)):
        assert_close(run[0]()[0], exact[0]()[0], "tucker_conv")
        assert_close(run[1]()[0], exact[1]()[0], "tucker_conv_backward")


def test_the_benchmark_costs_are_those_of_the_chain():
    forward, backward = bench.layer_costs(LAYER, 2)
    assert forward.flops == 2 * LAYER.pixels * (2 * 16 * 4 + 9 * 4 * 4)
    assert backward.flops == 2 * forward.flops
    assert backward.bytes > forward.bytes > 2 * LAYER.pixels * 2 * 16


def test_this_process_interprets():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert tucker_kernels.backends()["triton"] == (
        True,
        f"triton {triton.__version__} interpreted on the CPU (TRITON_INTERPRET=1), for tests",
    )
