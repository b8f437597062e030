"""The path chooser: monotone, steady, overridable, and safe with any file. Times are the benchmark's business."""

import dataclasses
import itertools
import json
import warnings

import pytest
import torch

import tucker_kernels as tk
from tucker_kernels import calibrate, cost_model

LAYER = cost_model.Conv(32, 128, 128, 32, 32, (16, 16), (16, 16), (3, 3), (1, 1), (1, 1), (1, 1))
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def larger(conv):
    """The same layer with one size more at a time."""
    for name in ("batch", "n_out", "n_in", "r_out", "r_in"):
        for step in (1, 7, 64):
            yield conv._replace(**{name: getattr(conv, name) + step})
    for step in (1, 3, 16):
        grown = tuple(n + step for n in conv.size)
        yield conv._replace(size=grown, out_size=tuple(n + step for n in conv.out_size))


@pytest.mark.parametrize("path", cost_model.PATHS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_work_is_never_expected_to_be_faster(path, training, dtype):
    for r, size in itertools.product((1, 8, 32, 64), (1, 4, 7, 16)):
        conv = LAYER._replace(r_out=r, r_in=r, size=(size, size), out_size=(size, size))
        before = cost_model.seconds(path, conv, dtype, training)
        assert before > 0
        for other in larger(conv):
            assert cost_model.seconds(path, other, dtype, training) >= before


def test_more_threads_and_less_training_are_never_slower():
    for path in cost_model.PATHS:
        times = [cost_model.seconds(path, LAYER, threads=n) for n in (1, 2, 4)]
        assert times == sorted(times, reverse=True)
        assert cost_model.seconds(path, LAYER, training=True) > times[0]


def test_operations_of_the_chain_are_those_of_three_convolutions():
    pixels = 32 * 16 * 16
    assert cost_model.operations("chain", LAYER) == 2 * pixels * (128 * 32 + 9 * 32 * 32 + 32 * 128)
    whole = LAYER._replace(r_out=None, r_in=None)
    assert cost_model.operations("chain", whole) == 2 * pixels * 9 * 128 * 128


def test_operations_of_reconstruct_are_those_of_the_weight_and_one_convolution():
    conv = LAYER._replace(n_out=96, r_out=16, r_in=8)
    weight = 9 * (96 * 16 * 8 + 96 * 128 * 8)  # U_out first
    assert cost_model.operations("reconstruct", conv) == 2 * (32 * 16 * 16 * 9 * 96 * 128 + weight)


def test_the_chain_writes_and_reads_its_rank_space_images():
    conv = LAYER._replace(r_out=16, r_in=8, out_size=(8, 8), stride=(2, 2))
    images = 32 * (16 * 16 * 8 + 8 * 8 * 16)
    assert cost_model.memory("chain", conv, 4) - cost_model.memory("fused", conv, 4) == 4 * 2 * images


def test_taps_outside_the_image_are_not_counted():
    conv = LAYER._replace(batch=1, size=(4,), out_size=(4,), window=(5,), stride=(1,), padding=(2,))
    conv = conv._replace(dilation=(1,))
    assert cost_model._inside(conv) == 3 + 4 + 4 + 3


def test_low_rank_factors_and_full_rank_reconstructs():
    low = LAYER._replace(r_out=4, r_in=4)
    assert cost_model.choose(low, ("chain", "reconstruct")) == "chain"
    full = LAYER._replace(r_out=128, r_in=128)
    assert cost_model.choose(full, ("chain", "reconstruct")) == "reconstruct"


def test_a_linear_layer_without_factors_is_one_product():
    """Both paths are then the same product: the first is taken, which reconstructs nothing."""
    assert cost_model.choose_linear(5, ((4, None), (6, None)), 1) == "chain"


def rates(rate=1e30, bandwidth=1e30, forward=1e-5, training=1e-5, team=1.0):
    return cost_model.Rates(rate, bandwidth, forward, training, team)


def linear_multiply_adds(m, n_out, n_in, r_out, r_in):
    """Of Uᵀ dYᵀ X V, by parentheses."""
    whole = r_out * n_out * n_in + r_out * n_in * r_in, n_out * n_in * r_in + r_out * n_out * r_in
    return {
        (False, False): r_out * n_out * m + m * n_in * r_in + r_out * m * r_in,
        (True, False): m * n_in * r_in + n_out * m * r_in + r_out * n_out * r_in,
        (False, True): r_out * n_out * m + r_out * m * n_in + r_out * n_in * r_in,
        (True, True): n_out * m * n_in + min(whole),
    }


def test_bases_meet_the_gradient_of_a_linear_layer_in_the_cheapest_order():
    chosen = set()
    for m, n_out, n_in, r_out, r_in in itertools.product((8, 64, 4096), *((16, 512),) * 2, *((2, 16),) * 2):
        multiply_adds = linear_multiply_adds(m, n_out, n_in, r_out, r_in)
        late = cost_model.project_linear_gradient(m, ((n_out, r_out), (n_in, r_in)), 1)
        assert multiply_adds[late] == min(multiply_adds.values())
        chosen.add(late)
    assert chosen == set(multiply_adds)


def test_projections_of_a_linear_layer_are_kept_where_they_save_a_quarter():
    chosen = set()
    for m, n_out, n_in, r in itertools.product((8, 64, 4096), *((64, 512),) * 2, (4, 16, 32, 64)):
        a_out, a_in = min(2 * r, n_out), min(2 * r, n_in)
        without = min(linear_multiply_adds(m, n_out, n_in, a_out, a_in).values())
        new_out, new_in = a_out - r, a_in - r
        of_blocks = r * m * new_in + new_out * m * r + new_out * m * new_in
        multiply_adds = m * n_out * new_out + m * n_in * new_in + of_blocks
        kept = cost_model.keep_projections(m, (n_out, n_in), (r, r))
        assert kept == (4 * multiply_adds <= 3 * without)
        chosen.add(kept)
    assert chosen == {False, True}


def test_the_path_in_use_stays_until_another_is_a_tenth_faster():
    def with_times(chain, fused):
        return {
            "float32": {name: rates(forward=t) for name, t in (("chain", chain), ("fused", fused), ("reconstruct", 9))}
        }

    paths = ("chain", "fused")
    for fused, expected in ((0.99, "chain"), (0.91, "chain"), (0.89, "fused"), (0.5, "fused")):
        machine = with_times(1.0, fused)
        assert cost_model.choose(LAYER, paths, machine=machine) == "fused"
        assert cost_model.choose(LAYER, paths, previous="chain", machine=machine) == expected
    assert cost_model.choose(LAYER, paths, previous="reconstruct", machine=with_times(1.0, 2.0)) == "chain"


@pytest.mark.parametrize("path", cost_model.PATHS)
def test_an_explicit_path_does_not_ask_the_model(path, monkeypatch):
    """An explicit path does not ask the model."""
    monkeypatch.setattr(cost_model, "choose", lambda *_, **__: pytest.fail("asked"))
    tk.tucker_conv(torch.randn(1, 4, 5, 5), torch.randn(2, 2, 3, 3), [torch.randn(4, 2)] * 2 + [None] * 2, path=path)


def test_a_layer_remembers_its_path(monkeypatch):
    """Per direction, and only where "auto" chooses."""
    asked = []
    monkeypatch.setattr(cost_model, "choose", lambda conv, paths, previous, **_: asked.append(previous) or "chain")
    x, memory = torch.randn(1, 4, 5, 5), {}
    core, factors = torch.randn(2, 2, 3, 3).requires_grad_(), [torch.randn(4, 2)] * 2 + [None] * 2
    tk.tucker_conv(x, core, factors, path="reconstruct", memory=memory)
    assert not memory
    for _ in range(2):
        tk.tucker_conv(x, core, factors, memory=memory)
    with torch.no_grad():
        tk.tucker_conv(x, core, factors, memory=memory)
    assert asked == [None, "chain", None]
    assert memory == {True: "chain", False: "chain"}


@pytest.mark.parametrize(
    ("choice", "dtype", "dimensions", "offered"),
    [
        *(("reference", torch.float32, 2, False), ("cpu", torch.float32, 2, True), ("cpu", torch.bfloat16, 1, True)),
        *(("cpu", torch.float16, 2, False), ("cpu", torch.float32, 3, False)),
    ],
)
def test_fused_is_offered_where_a_back_end_has_it(choice, dtype, dimensions, offered, monkeypatch):
    asked = []
    monkeypatch.setattr(cost_model, "choose", lambda conv, paths, **_: asked.append(paths) or "chain")
    x, core = torch.randn(1, 4, *[5] * dimensions, dtype=dtype), torch.randn(2, 2, *[3] * dimensions, dtype=dtype)
    with tk.use_backend(choice):
        tk.tucker_conv(x, core, [torch.randn(4, 2, dtype=dtype)] * 2 + [None] * dimensions)
    assert ("fused" in asked[0]) is offered


def test_constants_survive_the_file(tmp_path):
    path = tmp_path / "folder" / "machine.json"
    found = {"float32": {name: cost_model.Rates(1.0, 2.0, 3.0, 4.0, i) for i, name in enumerate(cost_model.PATHS, 5)}}
    assert cost_model.save(found, path) == path
    assert cost_model.load(path) == cost_model.DEFAULTS | found


def test_without_a_file_the_defaults_hold_silently(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost_model.load(tmp_path / "none.json") == cost_model.DEFAULTS


GOOD = {name: dataclasses.asdict(constants) for name, constants in cost_model.DEFAULTS["float32"].items()}


def changed(**constants):
    return json.dumps({"rates": {"float32": GOOD | {"chain": GOOD["chain"] | constants}}})


BROKEN = {
    "empty": "",
    "half written": '{"rates": {"float32"',
    "another kind": "[1, 2]",
    "no constants by dtype": '{"rates": [1, 2]}',
    "a constant missing": json.dumps({"rates": {"float32": GOOD | {"chain": {"rate": 1.0}}}}),
    "a path missing": json.dumps({"rates": {"float32": {"chain": GOOD["chain"]}}}),
    "of an older version": json.dumps({"rates": {"float32": {"chain": 9e10, "fused": 9e10, "launch": 1e-5}}}),
    "not a number": changed(rate="fast"),
    "zero": changed(bandwidth=0),
    "nan": changed(forward=float("nan")),
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_holds_no_constants_is_ignored_with_one_warning(content, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(BROKEN[content])
    with pytest.warns(UserWarning, match="calibrate") as caught:
        assert cost_model.load(path) == cost_model.DEFAULTS
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_the_file_follows_the_configuration_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cost_model.machine_file() == tmp_path / "tucker-kernels" / "machine.json"


def test_fit_finds_the_constants_that_made_the_times():
    true = {
        "chain": rates(8e10, 1e10, 9e-5, 4e-4, 3.0),
        "fused": rates(1e11, 2e10, 5e-5, 2e-4, 2.0),
        "reconstruct": rates(5e10, 3e10, 2e-5, 1e-4, 1.5),
    }
    samples = [
        (path, conv, training, threads, cost_model.seconds(path, conv, "float32", training, threads, {"float32": true}))
        for path, conv, training, threads in itertools.product(true, calibrate.LAYERS, (False, True), (1, 2))
    ]
    for path, found in calibrate.fit(samples, "float32").items():
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(true[path]), rel=1e-3)


def test_calibrate_measures_every_constant(monkeypatch):
    """Times are made up, in place of the layers' own."""
    monkeypatch.setattr(calibrate, "_seconds", lambda run: run)
    monkeypatch.setattr(calibrate, "layer_run", lambda path, conv, dtype, training: cost_model.seconds(path, conv))
    before = torch.get_num_threads()
    found = calibrate.measure(["float32"])
    assert torch.get_num_threads() == before
    assert set(found["float32"]) == set(cost_model.PATHS)


@pytest.mark.parametrize("path", cost_model.PATHS)
def test_calibration_layers_run(path):
    for conv in calibrate.LAYERS[:3]:
        calibrate.layer_run(path, conv, torch.float32, True)()


def test_the_model_counts_tiles_where_the_kernel_uses_them():
    """Tiles round differently from the direct sum; the model must foresee which of the two a layer gets.

    A build without tiles (`TK_WINOGRAD=0`) gives the direct sum for all.
    """
    for side, r in itertools.product((4, 5, 8, 16), (4, 8, 16, 64)):
        size = (side, side)
        conv = cost_model.Conv(4, r, r, None, None, size, size, (3, 3), (1, 1), (1, 1), (1, 1))
        x, core = torch.randn(4, r, side, side), torch.randn(r, r, 3, 3)
        x, core = x.round(decimals=1).mul(8).round(), core.mul(4).round()  # the direct sum is exact
        y = tk.tucker_conv(x, core, [None] * 4, padding=1, path="fused")
        exact = torch.equal(y, torch.nn.functional.conv2d(x, core, padding=1))
        assert exact == (cost_model._window_products(conv) == 4 * cost_model._inside(conv)), (side, r)


def test_a_file_that_cannot_be_read_is_ignored_with_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="cannot be read; the shipped constants are used") as caught:
        assert cost_model.load(tmp_path) == cost_model.DEFAULTS  # a folder
    assert len(caught) == 1


def test_who_reads_while_constants_are_written_reads_the_old_ones(tmp_path):
    path = tmp_path / "machine.json"
    cost_model.save(cost_model.DEFAULTS, path)
    old = path.read_text()
    with open(path) as reader:
        cost_model.save({"float32": cost_model.DEFAULTS["float32"]}, path)
        assert reader.read() == old


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 2), (1, 3)])
def test_taps_inside_are_those_that_meet_a_pixel(padding, stride, dilation):
    size, window = (7, 9), (3, 2)
    out = tuple((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, window))
    geometry = (window, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    count = torch.nn.functional.conv2d(torch.ones(1, 1, *size), torch.ones(1, 1, *window), None, *geometry[1:]).sum()
    assert cost_model._inside(cost_model.Conv(1, 1, 1, None, None, size, out, *geometry)) == int(count)
