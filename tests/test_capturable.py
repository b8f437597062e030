"""The step at fixed capacity equals the ordinary one, stays in place, and reads nothing from the device."""

import itertools
import sys

import pytest
import tdlrt
import torch
from emu import device as emulated
from tdlrt.capturable import _feasible
from tdlrt.layers.base import feasible
from test_method import batches, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tucker_kernels as tk
from tucker_kernels import cuda

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
BY_VALUE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "_assert_async")


class NoHostReads(TorchDispatchMode):
    """Raises where a value is read on the host or decides a shape."""

    def __init__(self, monkeypatch):
        super().__init__()
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._refuse(name))

    @staticmethod
    def _refuse(name):
        def read(self, *args, **kwargs):
            raise AssertionError(f"{name} reads a value")

        return read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        assert not name.startswith(BY_VALUE), f"{function} reads a value"
        return function(*args, **(kwargs or {}))


def model_at(ranks, modes="channels"):
    return tdlrt.tuckerize(network(), ranks=ranks, modes=modes, min_features=0).eval()


def backward(model, data):
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()


def tensors(model, optimizer):
    values = [v for s in optimizer.state.values() for v in s.values()]
    state = [v for value in values for v in (value if isinstance(value, list) else [value])]
    state = [v for v in state if isinstance(v, torch.Tensor)]
    return [p.detach() for p in model.parameters()] + state


BASES = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "max_grad_norm": 0.5, "max_rank": 6},
    # Adam divides by the size of each entry; a large eps keeps it from turning rounding noise into a step.
    "adam": {"lr": 0.01, "base": "adam", "eps": 1e-2, "weight_decay": 1e-3, "max_grad_norm": 0.5},
    "adamw": {"lr": 0.01, "base": "adamw", "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True},
    "muon": {"lr": 0.05, "base": "muon", "eps": 1e-2, "weight_decay": 0.1},
}
# What eager steps decide on the host.
RANK_OPTIONS = {
    "min_rank": {"min_rank": 4},
    "rank_multiple": {"rank_multiple": 3, "min_rank": 4, "tol": 0.9},
    "rank_multiple of each mode": {"rank_multiple": 2, "max_rank": 5, "tolerance_mode": "per_mode"},
    "conditioning": {"conditioning": 0.3},
    "basis_every": {"basis_every": 2},
    "rank_every": {"rank_every": 2},
    "all": {"basis_every": 2, "rank_every": 2, "rank_multiple": 2, "conditioning": 0.1},
}


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize("options", RANK_OPTIONS)
def test_equals_the_ordinary_step_with_bounds_and_cadence(options, modes, base):
    with tk.use_backend("reference"):
        check_against_the_ordinary_step(modes, {**BASES[base], "tol": 0.6, **RANK_OPTIONS[options]})


def test_ranks_are_made_feasible_on_the_device_as_on_the_host():
    for ranks in itertools.product((1, 2, 3, 7, 12), (1, 2, 5), (1, 2, 3), (1, 3)):
        for modes in ((0, 1), (0, 1, 2, 3), (2,)):
            assert _feasible(torch.tensor(ranks), modes).tolist() == feasible(ranks, modes)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize(("ranks", "tol"), [(0.6, 0.6), (0.6, 0.0), (None, 0.6)])
def test_equals_the_ordinary_step_with_ranks_up_to_the_capacity(modes, ranks, tol, base):
    """With an exact HOSVD: that of the CPU may stop early, which depends on the size of the core, zeros included."""
    with tk.use_backend("reference"):
        check_against_the_ordinary_step(modes, {**BASES[base], "tol": tol}, ranks)


def check_against_the_ordinary_step(modes, options, ranks=0.6):
    tol = options["tol"]
    one, two = model_at(ranks, modes), model_at(ranks, modes)
    capacity = {name: max(r) for name, r in tdlrt.ranks(one).items()}
    fixed = tdlrt.TDLRT(one, capturable=True, **options)
    plain = tdlrt.TDLRT(two, **options)
    rules = plain._truncation_rules  # the ordinary step has one max_rank for all modes, the capacity one for each

    def bounded(expansions):
        found = rules(expansions)
        for e, rule in found:
            if "max_rank" in rule:
                rule["max_rank"] = [min(m, c) for m, c in zip(rule["max_rank"], fixed.layers[e.name].ranks)]
                rule["min_rank"] = [min(*pair) for pair in zip(rule["min_rank"], rule["max_rank"])]
        return found

    plain._truncation_rules = bounded
    for data in batches(8):
        for model, optimizer in ((one, fixed), (two, plain)):
            optimizer.zero_grad()
            backward(model, data)
            optimizer.step()
        assert fixed.active_ranks() == tdlrt.ranks(two)
        for a, b in zip(tdlrt.to_dense(one).parameters(), tdlrt.to_dense(two).parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-11)
        for name, layer in fixed.layers.items():
            assert max(layer.ranks) == capacity[name]
            for mode, rank in enumerate(fixed.active_ranks()[name]):
                if layer.factors[mode] is not None:
                    U = layer.factors[mode].detach()
                    assert not U[:, rank:].any()
                    assert torch.allclose(U[:, :rank].T @ U[:, :rank], torch.eye(rank, dtype=U.dtype), atol=1e-12)
    if tol > 0:
        assert fixed.active_ranks() != tdlrt.ranks(one)


def capturable(model, base, **options):
    """An optimiser whose base counts its steps on the device, as it does on a GPU; `device_counters` lets torch."""
    optimizer = tdlrt.TDLRT(model, **{"tol": 0.1, "capturable": True, **BASES[base], **options})
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    return optimizer


@pytest.fixture
def device_counters(monkeypatch):
    """torch refuses to keep Adam's step count on the CPU as it does on a GPU; the code that does is the same."""
    module = sys.modules["torch.optim.adam"]  # AdamW's code too
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


@pytest.mark.parametrize("base", BASES)
def test_parameters_and_momentum_stay_in_place(base, device_counters):
    model = model_at(0.6)
    optimizer = capturable(model, base)
    backward(model, batches(1)[0])
    optimizer.step()
    before = [t.data_ptr() for t in tensors(model, optimizer)]
    for data in batches(3):
        optimizer.zero_grad()
        backward(model, data)
        optimizer.step()
    assert before == [t.data_ptr() for t in tensors(model, optimizer)]


@pytest.mark.parametrize("base", ["nesterov", "adamw"])
@pytest.mark.parametrize("options", RANK_OPTIONS)
def test_a_whole_period_reads_nothing_and_stays_in_place(options, base, device_counters, monkeypatch):
    model = model_at(0.6)
    optimizer = capturable(model, base, **RANK_OPTIONS[options])
    period = optimizer.basis_every * optimizer.rank_every

    def take(data):
        for batch in data:
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()

    data = batches(2 * period)
    take(data[:period])  # makes the state
    before, places = [t.clone() for t in tensors(model, optimizer)], [t.data_ptr() for t in tensors(model, optimizer)]
    with monkeypatch.context() as patch, NoHostReads(patch):
        take(data[period:])
    assert places == [t.data_ptr() for t in tensors(model, optimizer)]
    assert not any(torch.equal(a, b) for a, b in zip(before, tensors(model, optimizer)) if a.numel() > 100)


@pytest.mark.parametrize(
    ("device", "base"),
    [*(("host", base) for base in BASES), *(("emulated", base) for base in ("nesterov", "adamw", "muon"))],
)
def test_nothing_is_read_on_the_host(device, base, device_counters, monkeypatch):
    called = []
    if device == "emulated":  # the CUDA back end over csrc/emu
        emulated.install(monkeypatch)
        run = cuda._run
        monkeypatch.setattr(cuda, "_run", lambda name, *rest: (called.append(name), run(name, *rest)))
    model = model_at(0.6)
    optimizer = capturable(model, base)
    data = batches(3)
    for batch in data[:1]:
        backward(model, batch)
        optimizer.step()
    before = [t.clone() for t in tensors(model, optimizer)]
    with monkeypatch.context() as patch, NoHostReads(patch):
        for batch in data[1:]:
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, tensors(model, optimizer)) if a.numel() > 100)
    if device == "emulated":
        division = {"gram_solve"} if "momentum" in BASES[base] else set()
        assert {"tangent_basis", "hosvd_truncate", "rotate_bases"} | division <= set(called)


def test_ranks_are_those_of_the_moment_they_were_asked_for():
    model = model_at(0.6)
    optimizer = tdlrt.TDLRT(model, lr=0.05, momentum=0.9, tol=0.4, capturable=True)
    read, expected = [], []
    for data in batches(3):
        optimizer.zero_grad()
        backward(model, data)
        optimizer.step()
        read.append(optimizer.captured.ranks_later())
        expected.append(optimizer.active_ranks())
    assert [later() for later in read] == expected


def test_the_mode_sees_the_ordinary_step_read(monkeypatch):
    model = model_at(0.6)
    optimizer = tdlrt.TDLRT(model, lr=0.05, tol=0.1)
    backward(model, batches(1)[0])
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="reads a value"), NoHostReads(patch):
        optimizer.step()


def test_the_mode_sees_a_base_that_counts_on_the_host(monkeypatch):
    model = model_at(0.6)
    optimizer = tdlrt.TDLRT(model, lr=0.01, base="adam", tol=0.1, capturable=True)
    backward(model, batches(1)[0])
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="reads a value"), NoHostReads(patch):
        optimizer.step()


def test_adam_counts_where_the_parameters_are():
    assert not tdlrt.TDLRT(model_at(0.6), lr=0.01, base="adam", capturable=True).param_groups[0]["capturable"]
    model = model_at(0.6).to("meta")
    assert tdlrt.TDLRT(model, lr=0.01, base="adamw", capturable=True).param_groups[0]["capturable"]
    assert not tdlrt.TDLRT(model, lr=0.01, base="adamw").param_groups[0]["capturable"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("where", ["input", "core", "dense"])
def test_non_finite_steps_are_undone_on_the_device(where, base):
    model = model_at(0.6)
    optimizer = tdlrt.TDLRT(model, tol=0.1, capturable=True, **BASES[base])
    data = batches(3)
    backward(model, data[0])
    optimizer.step()
    before, ranks = [t.clone() for t in tensors(model, optimizer)], optimizer.active_ranks()
    optimizer.zero_grad()
    x, y = data[1]
    backward(model, (x * float("inf") if where == "input" else x, y))
    if where == "core":
        model[3].core.grad.view(-1)[5] = float("nan")
    if where == "dense":
        model[1].weight.grad[0] = float("nan")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(model, optimizer)))
    assert optimizer.captured.skipped == 1
    assert optimizer.active_ranks() == ranks
    optimizer.zero_grad()
    backward(model, data[2])
    optimizer.step()
    assert not torch.equal(before[0], tensors(model, optimizer)[0])
    assert optimizer.captured.skipped == 1


@pytest.mark.parametrize("base", BASES)
def test_a_non_finite_first_step_leaves_no_trace(base):
    model, twin = model_at(0.6), model_at(0.6)
    optimizers = [tdlrt.TDLRT(m, tol=0.1, capturable=True, **BASES[base]) for m in (model, twin)]
    data = batches(3)
    backward(model, (data[0][0] * float("nan"), data[0][1]))
    optimizers[0].step()
    for m, optimizer in zip((model, twin), optimizers):
        for batch in data[1:]:
            optimizer.zero_grad()
            backward(m, batch)
            optimizer.step()
    for a, b in zip(tensors(model, optimizers[0]), tensors(twin, optimizers[1])):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_compacting_keeps_the_weight_and_the_state(base):
    model = model_at(0.9)
    optimizer = tdlrt.TDLRT(model, capturable=True, **{**BASES[base], "tol": 0.3})
    for data in batches(2):
        optimizer.zero_grad()
        backward(model, data)
        optimizer.step()
    before = tdlrt.to_dense(model).state_dict()
    start = tdlrt.ranks(model)
    optimizer.compact(2)
    assert tdlrt.ranks(model) != start
    for name, ranks in optimizer.active_ranks().items():
        assert all(0 <= c - r < 2 for r, c, m in zip(ranks, tdlrt.ranks(model)[name], range(2)))
    for name, value in tdlrt.to_dense(model).state_dict().items():
        assert torch.allclose(value.double(), before[name].double(), rtol=0, atol=1e-14)
    optimizer.zero_grad()
    backward(model, batches(1)[0])
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"integrator": "parallel"}, "integrator is 'parallel' with capturable=True; allowed: 'one_pass'"),
        ({"base": torch.optim.RMSprop}, "base is .*RMSprop.*; allowed: 'sgd', 'adam', 'adamw', 'muon'"),
        ({"budget": 10**6}, "budget is 1000000"),
        ({"retain": "inline"}, "retain is 'inline'"),
    ],
)
def test_the_rest_is_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        tdlrt.TDLRT(model_at(0.5), lr=0.1, capturable=True, **options)
    with pytest.raises(RuntimeError, match="capturable=True"):
        tdlrt.TDLRT(model_at(0.5), lr=0.1).compact()


def test_ranks_in_use_before_the_first_step_and_of_layers_that_cannot_grow():
    model = tdlrt.tuckerize(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 9)), {"0": 3, "1": 9}, min_features=8)
    optimizer = tdlrt.TDLRT(model, lr=0.1, capturable=True)
    assert optimizer.active_ranks() == tdlrt.ranks(model)
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    assert set(optimizer.active_ranks()) == set(tdlrt.ranks(model))
