"""What is kept between the backward pass and the step: all pairs, or one layer's at a time."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import tdlrt
import torch
from tdlrt.arguments import check_processes
from torch import nn

from tucker_kernels import cost_model, linear

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import harness
import training_step

f64 = torch.float64


class Layers(nn.Module):
    """Every kind of Tucker layer, one of them called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.volume = tdlrt.TuckerConv3d(2, 6, 2, ranks=2, modes="all")
        self.image = tdlrt.TuckerConv2d(6, 9, 3, padding=1, ranks=(3, 2, 3, 2), modes="all")
        self.series = tdlrt.TuckerConv1d(9, 8, 3, stride=2, padding="valid", ranks=3)
        self.twice = tdlrt.TuckerLinear(8, 8, ranks=3)
        self.folded = tdlrt.TuckerLinear((2, 4), (3, 4), ranks=2)
        self.full = tdlrt.TuckerLinear(12, 12, ranks=12)  # cannot grow
        self.last = nn.Linear(12, 4)
        self.double()

    def forward(self, x):  # (batch, 2, 3, 6, 6)
        y = torch.tanh(self.volume(x)).mean(2)
        y = torch.tanh(self.image(y)).mean(3)
        y = torch.tanh(self.series(y)).mean(2)
        y = torch.tanh(self.twice(torch.tanh(self.twice(y))))
        return self.last(torch.relu(self.full(torch.tanh(self.folded(y)))))


def batch(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2, 3, 6, 6, dtype=f64, generator=generator)
    return x, torch.randint(0, 4, (size,), generator=generator)


def backward(model, data, factor=1.0):
    (factor * nn.functional.cross_entropy(model(data[0]), data[1])).backward()


OPTIONS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3, "tol": 0.03}


@pytest.mark.parametrize("options", [{}, {"base": "adamw", "momentum": 0.0, "lr": 1e-3}, {"basis_every": 2}], ids=str)
@pytest.mark.parametrize("factor", [1.0, 64.0])
@pytest.mark.usefixtures("linear_layers")
def test_inline_equals_deferred(options, factor):
    """Also where gradients are scaled after the backward pass."""
    model = Layers()
    twin = copy.deepcopy(model)
    pairs = [
        (m, tdlrt.TDLRT(m, retain=r, **{**OPTIONS, **options})) for m, r in ((model, "deferred"), (twin, "inline"))
    ]
    ranks = {str(tdlrt.ranks(model))}
    for step in range(6):
        for m, optimizer in pairs:
            optimizer.zero_grad()
            backward(m, batch(step), factor)
            for p in m.parameters():
                if p.grad is not None:
                    p.grad.div_(factor)
            optimizer.step()
        assert tdlrt.ranks(model) == tdlrt.ranks(twin)
        ranks.add(str(tdlrt.ranks(model)))
        for a, b in zip(tdlrt.to_dense(model).parameters(), tdlrt.to_dense(twin).parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-10)
    assert len(ranks) > 1


@pytest.mark.parametrize("retain", ["deferred", "inline"])
@pytest.mark.parametrize(("ranks", "kept"), [(3, True), (12, False)])
def test_a_linear_layer_projects_its_pairs_on_new_directions_only(ranks, kept, retain, monkeypatch):
    """Where that saves enough: not at the higher ranks, whose weight gradient takes fewer products."""
    monkeypatch.setattr(cost_model, "ONE_CALL", 0)
    projected = []

    def new_blocks(x, dy, bases, projections):
        for a, basis, own in zip((dy, x), bases, projections, strict=True):
            assert torch.allclose(own, a.flatten(0, -2) @ basis[:, :ranks], rtol=0, atol=1e-12)
            projected.append(own.shape)
        return linear.new_blocks(x, dy, bases, projections)

    monkeypatch.setattr("tdlrt.layers.linear.new_blocks", new_blocks)
    model = tdlrt.TuckerLinear(16, 24, ranks=ranks, dtype=f64)
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=None, retain=retain)
    x = torch.randn(5, 10, 16, dtype=f64)
    model(x).square().sum().backward()
    optimizer.step()
    assert projected == 2 * kept * [(50, ranks)]


def test_inline_keeps_no_pair_after_the_backward_pass():
    kept = {}
    for retain in ("deferred", "inline"):
        model = Layers()
        optimizer = tdlrt.TDLRT(model, retain=retain, **OPTIONS)
        backward(model, batch(0))
        kept[retain] = {name: optimizer.kept.calls(layer) for name, layer in optimizer.layers.items()}
    assert kept["deferred"] == {"volume": 1, "image": 1, "series": 1, "twice": 2, "folded": 1, "full": 0}
    assert set(kept["inline"].values()) == {0}


def test_inline_refuses_a_second_backward_pass_and_goes_on_after_zero_grad():
    model = Layers()
    optimizer = tdlrt.TDLRT(model, retain="inline", **OPTIONS)
    backward(model, batch(0))
    with pytest.raises(RuntimeError, match=r"second time before the step.*retain='deferred'"):
        backward(model, batch(1))
    optimizer.zero_grad()
    before = model.twice.core.detach().clone()
    backward(model, batch(2))
    optimizer.step()
    assert before.shape != model.twice.core.shape or not torch.equal(before, model.twice.core)


def test_inline_refuses_gradients_changed_after_the_backward_pass():
    model = Layers()
    optimizer = tdlrt.TDLRT(model, retain="inline", **OPTIONS)
    backward(model, batch(0))
    model.image.core.grad.mul_(0.9)
    with pytest.raises(RuntimeError, match=r"gradients of image .*two_pass"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_inline_changes_nothing_on_non_finite_gradients(when, value):
    """Also where a gradient of a factor, which its momentum takes up in the step, was finite in the backward pass."""
    model = Layers()
    optimizer = tdlrt.TDLRT(model, retain="inline", on_nonfinite="skip", **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0)
    if when == "before":
        x[0, 0, 0, 0, 0] = value
    backward(model, (x, y))
    if when == "after":
        model.image.factors[1].grad[0, 0] = value
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    backward(model, batch(0))
    optimizer.step()
    assert optimizer.steps == 1


def test_inline_hooks_do_not_travel_with_copies_or_outlive_the_optimiser():
    model = Layers()
    optimizer = tdlrt.TDLRT(model, retain="inline", **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(twin, batch(0)), backward(twin, batch(1))
    del optimizer
    backward(model, batch(0)), backward(model, batch(1))


@pytest.mark.parametrize("integrator", ["parallel", "two_pass", "standard"])
def test_inline_is_for_one_pass(integrator):
    with pytest.raises(ValueError, match="retain is 'inline' with integrator="):
        tdlrt.TDLRT(Layers(), lr=0.1, retain="inline", integrator=integrator)


def test_a_step_peaks_below_dense_training():
    """At r = n/4 a step takes less than dense training, and inline hardly more than training the factors plainly."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    dense = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    peaks = {}
    for name, step in training_step.candidates(dense, 0.25, training_step.batch(4), False).items():
        for _ in range(2):
            step()
        peaks[name] = harness.held_bytes(step.model, step.optimizer) + harness.peak_bytes(step)
    assert peaks["one_pass, inline"] <= 1.15 * peaks["plain factors"]
    assert peaks["one_pass, inline"] < peaks["dense"]
    assert peaks["one_pass, inline"] < peaks["one_pass"]
    # The meters see momentum outside the bases, and a tensor come and go.
    one = training_step.candidates(dense, 0.25, training_step.batch(4), False)["one_pass"]
    one()
    held = harness.held_bytes(one.model, one.optimizer)
    outside = [m for state in one.optimizer.state.values() for m in state.pop("momentum_outside", ()) if m is not None]
    assert harness.held_bytes(one.model, one.optimizer) == held - sum(m.nbytes for m in outside) < held
    assert harness.peak_bytes(lambda: torch.empty(2**20).sum()) == 2**22 + 4


def test_what_is_for_one_process_is_refused_in_several():
    with pytest.raises(ValueError, match=r"^retain is 'inline' with several processes"):
        check_processes(False, "one_pass", "inline", False)
    with pytest.raises(ValueError, match=r"^capturable is True with several processes"):
        check_processes(False, "one_pass", "deferred", True)
