"""Copies, pickles and state dicts of the optimiser: whatever comes back goes on as if nothing had happened."""

import copy
import io
import pickle

import pytest
import tdlrt
import torch
from tdlrt import momentum
from torch import nn

from tucker_kernels import cost_model

OPTIONS = {
    "momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "inline": {"lr": 0.1, "momentum": 0.9, "retain": "inline"},
    "amortised": {"lr": 0.1, "momentum": 0.9, "basis_every": 2, "max_grad_norm": 0.5},
    "budget": {"lr": 0.1, "budget": 3000},
    "adamw": {"lr": 0.01, "base": "adamw", "amsgrad": True},
    "muon": {"lr": 0.01, "base": "muon"},
    "capturable": {"lr": 0.1, "momentum": 0.9, "capturable": True},
}


def made(kind="momentum", ranks=0.5, seed=0, **options):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(64, 16)
    model = tdlrt.tuckerize(nn.Sequential(*layers).double(), ranks=ranks, min_features=0)
    return model, tdlrt.TDLRT(model, tol=0.15, **OPTIONS[kind], **options)


def run(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def tensors(model, optimizer):
    """Parameters, buffers and state in a fixed order."""
    values = [v for p in model.parameters() for _, v in sorted(optimizer.state[p].items())]
    state = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return [*model.state_dict().values(), *(v for v in state if isinstance(v, torch.Tensor))]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_copy_goes_on_by_itself(copied, kind):
    model, optimizer = made(kind)
    run(model, optimizer, 3)
    before = [t.clone() for t in tensors(model, optimizer)]
    twin, other = copied((model, optimizer))
    assert other.model is twin
    assert repr(other) == repr(optimizer)
    run(twin, other, 3, start=3)
    assert same(before, tensors(model, optimizer))
    run(model, optimizer, 3, start=3)
    assert same(tensors(model, optimizer), tensors(twin, other))
    assert optimizer.steps == other.steps == 6
    assert optimizer.active_ranks() == other.active_ranks()


def resumed_alike(run_on, make):
    """Whether a run that was stored, loaded by a new process and went on ends where the run ends that just went on."""
    model, optimizer = make()
    run_on(model, optimizer, 4, 0)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    run_on(model, optimizer, 5, 4)
    other, again = make()
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    run_on(other, again, 5, 4)
    return same(tensors(model, optimizer), tensors(other, again))


@pytest.mark.parametrize("retain", ["deferred", "inline"])
def test_a_run_with_scaled_gradients_goes_on_bit_for_bit(retain):
    """Inline, new directions are chosen by the scale of the step before."""

    def run_on(model, optimizer, steps, start):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(start, start + steps):
            x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    assert resumed_alike(run_on, lambda: made("momentum", retain=retain))


def test_a_run_goes_on_by_the_paths_it_had(monkeypatch):
    """A path stays until another is clearly faster, so what was fastest before has to come along."""
    monkeypatch.setattr(cost_model, "HYSTERESIS", 0.99)
    model, _ = made()
    run(model, tdlrt.TDLRT(model, lr=0.1), 1)
    fastest = model[3].chosen_paths[True]
    other = next(path for path in cost_model.PATHS if path != fastest)

    def run_on(model, optimizer, steps, start):
        if start == 0:
            model[3].chosen_paths[True] = other
        run(model, optimizer, steps, start)
        assert model[3].chosen_paths[True] == other

    assert resumed_alike(run_on, made)


def test_groups_and_schedulers_come_along():
    model, _ = made()
    groups = [{"params": list(model[0].parameters()), "tol": 0.3}, {"params": list(model[1:].parameters()), "lr": 0.02}]
    optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, params=groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run(model, optimizer, 1)
    scheduler.step()
    other = copy.deepcopy(optimizer)
    plain = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert plain == [{k: v for k, v in group.items() if k != "params"} for group in other.param_groups]
    assert plain[1]["lr"] == 0.01


@pytest.mark.parametrize("model_first", [True, False])
def test_momentum_goes_to_a_model_of_other_ranks(model_first):
    model, optimizer = made()
    run(model, optimizer, 3)
    stored = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin, other = made(ranks=0.9, seed=1)
    run(twin, other, 1)
    assert tdlrt.ranks(twin) != tdlrt.ranks(model)
    for part, state in sorted(zip((twin, other), stored), key=lambda pair: (pair[0] is twin) != model_first):
        part.load_state_dict(state)
    for pair in ((model, optimizer), (twin, other)):
        run(*pair, 3, start=3)
    assert same(tensors(model, optimizer), tensors(twin, other))


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("integrator", ["one_pass", "parallel"])
def test_a_state_of_other_ranks_is_refused_in_a_sentence(kind, integrator):
    model, optimizer = made(kind, integrator=integrator)
    run(model, optimizer, 3)
    twin, other = made(kind, ranks=0.9, integrator=integrator)
    before = copy.deepcopy(twin.state_dict())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state of 0\.core has ranks .* load the model"):
        run(twin, other, 1)
    parameters = dict(twin.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items() if name in parameters)


def test_a_state_dict_without_momentum_outside_the_bases():
    """Of the releases before there was any: directions outside start from rest."""
    model, optimizer = made()
    run(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries.pop(momentum.OUTSIDE, None)
    for group in state["param_groups"]:
        for name in ("tol", "steps", "bases_frozen"):
            del group[name]
    for entries in optimizer.state.values():
        if momentum.OUTSIDE in entries:
            entries[momentum.OUTSIDE] = [None for _ in entries[momentum.OUTSIDE]]
    twin = copy.deepcopy(model)
    other = tdlrt.TDLRT(twin, tol=0.15, **OPTIONS["momentum"])
    other.load_state_dict(state)
    assert other.steps == 0
    for pair in ((model, optimizer), (twin, other)):
        run(*pair, 3, start=3)
    assert same(tensors(model, optimizer), tensors(twin, other))
    assert any(momentum.OUTSIDE in entries for entries in other.state.values())


@pytest.mark.parametrize("kind", ["momentum", "inline", "adamw"])
def test_the_state_follows_a_change_of_dtype(kind):
    model, optimizer = made(kind)
    twin, other = made(kind)
    for m, o in ((model, optimizer), (twin, other)):
        run(m, o, 2)
    model.float()
    run_in(torch.float32, model, optimizer, 3)
    run_in(torch.float64, twin, other, 3)
    kept = [v for s in optimizer.state.values() for v in s.values()]
    kept = [v for value in kept for v in (value if isinstance(value, list) else [value])]
    assert {v.dtype for v in kept if isinstance(v, torch.Tensor) and v.ndim} == {torch.float32}
    atol = 5e-3 if kind == "adamw" else 1e-4  # AdamW divides small entries by their size; three steps are 3e-2
    for a, b in zip(tdlrt.to_dense(model).parameters(), tdlrt.to_dense(twin).parameters()):
        assert torch.allclose(a.double(), b, rtol=0, atol=atol)
    model.double()
    run(model, optimizer, 1)


def run_in(dtype, model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
