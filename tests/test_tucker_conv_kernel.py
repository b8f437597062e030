"""The fused CPU kernel of tucker_conv where it tiles: bands, groups of images, teams of threads, ragged channels.

The small problems of test_tucker_conv.py go through it too (path "fused"); these are large enough to be cut up.
"""

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from problems import Conv
from tolerances import assert_close

import tucker_kernels as tk
from tucker_kernels import cost_model
from tucker_kernels.dispatch import _log_refusal
from tucker_kernels.library import ops

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import harness

TILED = [
    Conv("resnet_wide", n_out=64, n_in=64, r_out=32, r_in=16, size=(32, 32), batch=3, padding=1),
    Conv("resnet_deep", n_out=96, n_in=80, r_out=40, r_in=48, size=(4, 4), batch=33, padding=1),
    Conv("many_groups", n_out=40, n_in=24, r_out=24, r_in=20, size=(9, 7), batch=150, padding=1),
    Conv("ragged", n_out=67, n_in=35, r_out=19, r_in=13, size=(13, 11), batch=5, padding=1),
    Conv("one_image", n_out=16, n_in=24, r_out=9, r_in=8, size=(61, 43), batch=1, padding=1),
    Conv("stride", n_out=48, n_in=32, r_out=16, r_in=24, size=(15, 18), batch=4, stride=(2, 3), padding=(1, 2)),
    Conv(
        "stride_beyond_the_window", n_out=8, n_in=8, r_out=4, r_in=4, size=(23, 20), batch=2, stride=(3, 4), padding=1
    ),
    Conv("dilation", n_out=32, n_in=16, r_out=12, r_in=8, size=(17, 19), batch=3, dilation=(3, 2), padding=(3, 1)),
    Conv("window_7x7", n_out=16, n_in=3, r_out=8, r_in=3, window=(7, 7), size=(20, 22), batch=4, stride=2, padding=3),
    Conv("window_5x1", n_out=24, n_in=24, r_out=16, r_in=8, window=(5, 1), size=(31, 6), batch=3, padding=(2, 0)),
    Conv("window_1x1", n_out=72, n_in=40, r_out=33, r_in=17, window=(1, 1), size=(14, 14), batch=5),
    Conv("window_covers_the_image", n_out=8, n_in=8, r_out=4, r_in=8, window=(5, 5), size=(3, 4), batch=20, padding=4),
    # Bands of 32 and of 33 rows, the smaller of which has the larger padded pitch.
    Conv("one_column", n_out=16, n_in=8, r_out=8, r_in=8, window=(3, 1), size=(97, 1), batch=7, padding=(1, 0)),
    Conv("rank_one", n_out=64, n_in=64, r_out=1, r_in=1, size=(16, 16), batch=4, padding=1),
    Conv("full_rank", n_out=32, n_in=32, r_out=32, r_in=32, size=(8, 8), batch=9, padding=1),
    Conv("no_out_factor", n_out=33, n_in=40, r_out=None, r_in=16, size=(12, 12), batch=4, padding=1),
    Conv("no_in_factor", n_out=40, n_in=33, r_out=16, r_in=None, size=(12, 12), batch=4, padding=1),
    Conv("no_factor", n_out=32, n_in=16, r_out=None, r_in=None, size=(12, 12), batch=4, padding=1, stride=2),
    Conv("sequence", n_out=32, n_in=20, r_out=16, r_in=7, window=(9,), size=(300,), batch=5, stride=2, padding=4),
]
# Core gradients in tiles whose sums the threads share: in several groups of images, and in one.
SHARED = [
    Conv("shared_sums", n_out=104, n_in=120, r_out=100, r_in=90, size=(17, 19), batch=20, padding=1),
    Conv("shared_sums_of_one_group", n_out=170, n_in=160, r_out=165, r_in=160, size=(4, 4), batch=20, padding=1),
]
BY_NAME = {problem.name: problem for problem in (*TILED, *SHARED)}
tiled = pytest.mark.parametrize("problem", TILED, ids=str)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def results(problem, dtype, path="fused", recompute=False, last=True):
    """(operands, output gradient, [y, gradients of input, core, bias, U_out, U_in])."""
    torch.manual_seed(0)
    input, core, factors, bias = problem.operands(dtype)
    if last and input.ndim == 4:
        input = input.contiguous(memory_format=torch.channels_last)
    operands = [x if x is None else x.requires_grad_() for x in (input, core, bias, *factors)]
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, path, recompute)
    grad = torch.randn_like(y)
    given = [x for x in operands if x is not None]
    return operands, grad, [y.detach(), *torch.autograd.grad(y, given, grad)]


def check(problem, dtype, function=results, **options):
    operands, grad, (y, *found) = function(problem, dtype, **options)

    def dense(input, core, bias, *factors):
        return oracles.conv(input, core, factors, bias, *problem.geometry)

    with torch.no_grad():
        assert_close(y, dense(*operands), "tucker_conv")
    expected = [x for x in oracles.gradients(dense, operands, grad) if x is not None]
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        assert actual.dtype == dtype
        assert_close(actual, wanted, "tucker_conv_backward")


@tiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_the_dense_convolution(problem, dtype):
    check(problem, dtype)


@pytest.mark.parametrize("problem", [*TILED, *SHARED], ids=str)
def test_several_threads_give_the_same(problem, threads):
    check(problem, torch.float32)


@pytest.mark.parametrize("name", ["ragged", "stride", "no_in_factor", "no_out_factor", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recomputing_and_contiguous_input(name, dtype):
    check(BY_NAME[name], dtype, recompute=True, last=False)


@tiled
def test_the_result_does_not_depend_on_threads(problem):
    """Bitwise for images; gradients of weights are summed thread by thread, and are the same for equal threads."""
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(results(problem, torch.float32)[2])
    torch.set_num_threads(2)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert torch.equal(found[0][1], other[1])
    for a, b in zip(found[1], found[3]):
        assert torch.equal(a, b)


@tiled
def test_only_needed_images_are_saved(problem):
    """z and t are the rank-space images of the reference, and nothing is kept where nothing is needed."""
    input, core, factors, bias = problem.operands(torch.float32)
    window = core.ndim - 2
    geometry = [[g] * window if isinstance(g, int) else list(g) for g in problem.geometry]
    _, z, t = ops.tucker_conv_forward(input, core, *factors[:2], bias, *geometry, "fused", True)
    wide = [None if x is None else x.double() for x in (input, core, *factors[:2], bias)]
    with tk.use_backend("reference"):
        _, z_wide, t_wide = ops.tucker_conv_forward(*wide, *geometry, "chain", True)
    assert_close(z, z_wide, "tucker_conv")
    assert_close(t, t_wide, "tucker_conv")
    _, z, t = ops.tucker_conv_forward(input, core, *factors[:2], bias, *geometry, "fused", False)
    assert z.numel() == t.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        *("resnet_deep", "ragged", "one_image", "stride", "dilation", "window_7x7", "sequence"),
        *("shared_sums", "shared_sums_of_one_group"),
    ],
)
def test_core_gradient_in_augmented_bases(name, dtype, threads):
    """rank_space_wgrad with bases wider than the factors, [U|V], against the projected dense gradient."""
    problem = BY_NAME[name]
    input, core, factors, _ = problem.operands(dtype)
    bases = [
        torch.linalg.qr(torch.randn(f.shape[0], min(2 * f.shape[1], f.shape[0])))[0].to(dtype) for f in factors[:2]
    ]
    weight = oracles.tucker_to_tensor(core, factors)
    identity = [None] * weight.ndim
    grad = torch.randn_like(oracles.conv(input, weight, identity, None, *problem.geometry)).to(dtype)
    (dense,) = oracles.gradients(lambda w: oracles.conv(input, w, identity, None, *problem.geometry), [weight], grad)
    expected = dense
    for i, basis in enumerate(bases):
        expected = oracles.mode_dot(expected, basis, i, transpose=True)
    arguments = (input, grad, [*bases, *[None] * len(problem.window)], problem.window, *problem.geometry)
    assert_close(tk.tucker_conv_core_grad(*arguments), expected, "core_grad")
    scale = float(expected.abs().max())
    r_out, r_in = expected.shape[:2]
    for known in ((r_out // 2, r_in // 2), (r_out, 9), (11, r_in), (1, r_in - 1), (r_out, r_in), (3, 0)):
        known = tuple(min(k, r) for k, r in zip(known, (r_out, r_in)))
        found, wanted = tk.tucker_conv_core_grad(*arguments, known), expected.clone()
        wanted[: known[0], : known[1]] = 0
        assert_close(found, wanted, "core_grad", scale)
        assert not found[: known[0], : known[1]].any()


@pytest.mark.parametrize("late", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("known", [(), (3, 5)])
def test_bases_may_be_applied_to_the_gradient(late, known, monkeypatch):
    monkeypatch.setattr(cost_model, "project_gradient", lambda *_: late)
    problem = BY_NAME["ragged"]
    input, core, factors, _ = problem.operands(torch.float64)
    grad = torch.randn_like(oracles.conv(input, core, factors, None, *problem.geometry))
    geometry = [[1, 1]] * 3
    found = ops.rank_space_wgrad(input, grad, *factors[:2], [3, 3], *geometry, known)
    with tk.use_backend("reference"):
        expected = ops.rank_space_wgrad(input, grad, *factors[:2], [3, 3], *geometry, known)
    assert_close(found, expected, "core_grad")
    assert not known or not found[:3, :5].any()


def test_recomputing_keeps_no_more_than_the_dense_layer():
    """Bytes that autograd holds between forward and backward pass beside the operands."""
    x, core = torch.randn(2, 32, 16, 16), torch.randn(16, 16, 3, 3)
    u_out, u_in, dense = torch.randn(32, 16), torch.randn(32, 16), torch.randn(32, 32, 3, 3)
    operands = [v.requires_grad_() for v in (x, core, u_out, u_in, dense)]
    x, core, u_out, u_in, dense = operands

    def held(function):
        kept = {}
        own = {v.untyped_storage().data_ptr() for v in operands}

        def pack(v):
            if v.untyped_storage().data_ptr() not in own:
                kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            function()
        return sum(kept.values())

    def fused(recompute):
        return tk.tucker_conv(x, core, [u_out, u_in, None, None], padding=1, path="fused", recompute=recompute)

    assert held(lambda: fused(True)) == held(lambda: torch.nn.functional.conv2d(x, dense, padding=1)) == 0
    assert held(lambda: fused(False)) == 2 * 2 * 16 * 16 * 16 * 4  # z and t


def in_a_process_of_its_own(code, **environment):
    """Where the kernels read their environment: they do it once."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root / "tests"), *sys.path])
    command = [sys.executable, "-c", "import torch, test_tucker_conv_kernel as t, tucker_kernels as tk\n" + code]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_equals_the_reference(isa):
    """The same tests with narrower vectors."""
    code = (
        f"assert tk.backends()['cpu'][1].endswith({isa!r}), tk.backends()['cpu']\n"
        "for problem in t.TILED:\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16): t.check(problem, dtype)\n"
    )
    in_a_process_of_its_own(code, TK_ISA=isa)


def test_winograd_can_be_switched_off():
    """Direct sums are several times as accurate as tiles."""
    code = (
        "operands, _, (y, *_) = t.results(t.BY_NAME['resnet_wide'], torch.float32)\n"
        "x, core, bias, *factors = operands\n"
        "with torch.no_grad():\n"
        "    exact = t.oracles.conv(x, core, factors, bias, 1, 1, 1)\n"
        "print(float((y - exact).norm() / exact.norm()))\n"
    )
    tiles, direct = (float(in_a_process_of_its_own(code, TK_WINOGRAD=switch)) for switch in ("1", "0"))
    assert 2 * direct < tiles < 1e-5


def test_nan_stays_visible():
    problem = BY_NAME["ragged"]
    input, core, factors, bias = problem.operands(torch.float32)
    input[1, 2, 3, 4] = torch.nan
    y = tk.tucker_conv(input, core, factors, bias, *problem.geometry, "fused")
    bad = y.isnan().flatten(1)
    assert bad[1].any()
    assert not bad[[0, 2, 3, 4]].any()
    zero = torch.zeros_like(core)  # 0 · NaN
    assert tk.tucker_conv(input, zero, factors, bias, *problem.geometry, "fused").isnan().any()


def test_what_the_kernel_does_not_take_is_said(caplog):
    _log_refusal.cache_clear()
    x, core = torch.randn(1, 4, 5, 5, 5), torch.randn(2, 2, 3, 3, 3)
    factors = [torch.randn(4, 2), torch.randn(4, 2), None, None, None]
    with caplog.at_level(logging.INFO, logger="tucker_kernels"):
        y = tk.tucker_conv(x, core, factors, path="fused")
    assert_close(y, oracles.conv(x, core, factors, None, 1, 0, 1), "tucker_conv")
    assert "3 window dimensions" in caplog.text


def _drop_a_tap(problem, dtype):
    operands, grad, found = results(problem, dtype)
    operands[1] = operands[1].detach().clone()
    operands[1][:, :, -1, -1] = 0
    return operands, grad, found


def _drop_an_image(problem, dtype):
    operands, grad, found = results(problem, dtype)
    found[1][-1] = 0
    return operands, grad, found


def _miss_a_border_pixel(problem, dtype):
    operands, grad, found = results(problem, dtype)
    found[0][0, :, 0, -1] -= operands[2]
    return operands, grad, found


def _sum_one_pixel_twice(problem, dtype):
    operands, grad, found = results(problem, dtype)
    found[3] = found[3] + grad[0, :, 0, 0]
    return operands, grad, found


@pytest.mark.parametrize("mistake", [_drop_a_tap, _drop_an_image, _miss_a_border_pixel, _sum_one_pixel_twice])
def test_the_oracle_rejects(mistake):
    with pytest.raises(AssertionError):
        check(BY_NAME["ragged"], torch.float32, function=mistake)


@pytest.mark.parametrize("planted", [False, True])
def test_recomputing_holds_no_more_at_once_than_dense_layers(planted):
    """Four layers, forward and backward; working memory inside our kernel is not counted. Planted: z and t are kept."""
    n, r, depth = 64, 16, 4
    start = torch.randn(16, n, 16, 16).contiguous(memory_format=torch.channels_last)
    core, u_out, u_in, dense = (
        torch.randn(shape).requires_grad_() for shape in ((r, r, 3, 3), (n, r), (n, r), (n, n, 3, 3))
    )

    def peak(layer):
        def call():
            x = start.clone().requires_grad_()
            for _ in range(depth):
                x = layer(x)
            x.sum().backward()

        return harness.peak_bytes(call)

    def tucker(x):
        return tk.tucker_conv(x, core, [u_out, u_in, None, None], padding=1, path="fused", recompute=not planted)

    fits = peak(tucker) <= peak(lambda x: torch.nn.functional.conv2d(x, dense, padding=1))
    assert fits is not planted
