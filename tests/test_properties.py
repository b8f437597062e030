"""Properties of the step over random shapes, ranks, modes, integrators and base optimisers."""

import copy
import math

import pytest
import tdlrt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

f64 = torch.float64

BASES = {
    "sgd": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    # Adam divides by the size of each entry; a large eps keeps it from turning rounding noise into a step.
    "adam": {"lr": 0.01, "base": "adam", "eps": 1e-2},
    "amsgrad": {"lr": 0.01, "base": "adamw", "amsgrad": True, "eps": 1e-2},
    "muon": {"lr": 0.01, "base": "muon", "eps": 1e-2},
}


@st.composite
def layers(draw):
    """(a Tucker layer in float64, a batch it takes)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from([1, 2, 3, "linear", "folded"]))
    modes = draw(st.sampled_from(["channels", "all"]))
    size = st.integers(1, 9)
    if kind == "linear":
        n_in, n_out = draw(size), draw(size)
        layer = tdlrt.TuckerLinear(n_in, n_out, ranks=draw(st.integers(1, 9)))
        shape = (draw(st.integers(1, 6)), n_in)
    elif kind == "folded":
        inner, outer = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(st.tuples(st.integers(1, 4)))
        layer = tdlrt.TuckerLinear(inner, outer, ranks=draw(st.integers(1, 4)))
        shape = (draw(st.integers(1, 6)), math.prod(inner))
    else:
        n_in, n_out, window = draw(size), draw(size), draw(st.integers(1, 3))
        layer = (tdlrt.TuckerConv1d, tdlrt.TuckerConv2d, tdlrt.TuckerConv3d)[kind - 1](
            *(n_in, n_out, window),
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            bias=draw(st.booleans()),
            ranks=draw(st.integers(1, 9)),
            modes=modes,
        )
        shape = (draw(st.integers(1, 4)), n_in, *[draw(st.integers(3, 5)) for _ in range(kind)])
    return layer.double(), torch.randn(shape, dtype=f64)


def step(layer, optimizer, x, target_seed=0):
    def closure():
        optimizer.zero_grad()
        y = layer(x)
        target = torch.randn(y.shape, dtype=f64, generator=torch.Generator().manual_seed(target_seed))
        loss = ((y - target) ** 2).mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


def check_state(layer, optimizer):
    assert tdlrt.orthogonality_error(layer) <= 1e-12
    shape = layer.core.shape
    for mode, rank in enumerate(shape):
        size = layer.weight_shape[mode]
        assert 1 <= rank <= size
        if layer.factors[mode] is not None:
            assert rank <= math.prod(shape) // rank
            assert layer.factors[mode].shape == (size, rank)
            assert layer.factors[mode].grad is None
    for value in optimizer.state[layer.core].values():
        assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == shape
    if "exp_avg_sq" in optimizer.state[layer.core]:
        assert optimizer.state[layer.core]["exp_avg_sq"].min() >= 0


def flat(value):
    return value if isinstance(value, list) else [value]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    layers(),
    st.sampled_from(["one_pass", "inline", "parallel", "two_pass", "standard"]),
    st.sampled_from(sorted(BASES)),
    st.sampled_from([0.0, 0.05, 0.5, None]),
    st.sampled_from([{}, {"min_rank": 2}, {"max_rank": 3}, {"rank_multiple": 2}, {"tolerance_mode": "per_mode"}]),
)
def test_every_step_leaves_a_tucker_weight(case, integrator, base, tol, options):
    layer, x = case
    if integrator == "inline":
        integrator, options = "one_pass", {**options, "retain": "inline"}
    optimizer = tdlrt.TDLRT(layer, tol=tol, integrator=integrator, **BASES[base], **options)
    start = layer.ranks
    for seed in range(3):
        loss = step(layer, optimizer, x, seed)
        assert torch.isfinite(loss)
        check_state(layer, optimizer)
        assert all(torch.isfinite(p).all() for p in layer.parameters())
    if tol is None:
        assert layer.ranks == start
    if "max_rank" in options and tol is not None:
        assert all(layer.ranks[mode] <= 3 for mode in layer.modes)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(layers(), st.sampled_from(sorted(BASES)), st.sampled_from([0.0, None]), st.booleans())
def test_one_pass_and_two_pass_agree(case, base, tol, inline):
    """One step, at tolerances that no rounding can tip: ranks and weights are those of two passes."""
    layer, x = case
    twin = copy.deepcopy(layer)
    one = tdlrt.TDLRT(layer, tol=tol, retain="inline" if inline else "deferred", **BASES[base])
    two = tdlrt.TDLRT(twin, tol=tol, integrator="two_pass", **BASES[base])
    a, b = step(layer, one, x), step(twin, two, x)
    assert torch.equal(a, b)
    if tol is None:
        assert layer.ranks == twin.ranks
    scale = 1 + twin.weight.detach().abs().max()
    assert torch.allclose(layer.weight, twin.weight, rtol=0, atol=1e-10 * float(scale))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    layers(),
    st.sampled_from(["one_pass", "inline", "parallel", "two_pass", "standard"]),
    st.sampled_from(sorted(BASES)),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.data(),
)
def test_non_finite_input_changes_nothing(case, integrator, base, value, data):
    layer, x = case
    options = {"retain": "inline"} if integrator == "inline" else {}
    kind = "one_pass" if integrator == "inline" else integrator
    optimizer = tdlrt.TDLRT(layer, tol=0.05, integrator=kind, **BASES[base], **options)
    step(layer, optimizer, x)
    before = [p.detach().clone() for p in layer.parameters()]
    state = [copy.deepcopy(dict(optimizer.state[p])) for p in layer.parameters()]
    bad = x.clone()
    bad.view(-1)[data.draw(st.integers(0, bad.numel() - 1))] = value
    y = layer(bad)
    if torch.isfinite(y).all():  # a stride passed over it
        return
    with pytest.raises(tdlrt.NonFiniteError):
        step(layer, optimizer, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    for old, p in zip(state, layer.parameters()):
        for key, kept in optimizer.state[p].items():
            for one, other in zip(flat(kept), flat(old[key]), strict=True):
                assert one is other or torch.equal(torch.as_tensor(one), torch.as_tensor(other)), key
    step(layer, optimizer, x)
    check_state(layer, optimizer)


@st.composite
def recipes(draw):
    """How a model is trained: everything that momentum, schedules, clipping and accumulation can do at once."""
    beta = draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = beta > 0 and draw(st.booleans())
    own = {"nesterov": True} if nesterov else {"dampening": draw(st.sampled_from([0.0, 0.3]))}
    own["maximize"] = draw(st.booleans())
    return {
        "sgd": {"lr": 0.05, "momentum": beta, "weight_decay": draw(st.sampled_from([0.0, 1e-2])), **own},
        "limit": draw(st.sampled_from([None, 0.1, 1.0])),
        "micro_batches": draw(st.integers(1, 3)),
        "one_cycle": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def small_network(seed):
    """Every weight has full rank in every mode: no side is above the product of the others."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 3, stride=2), nn.Tanh(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 16), nn.Tanh()).double()


STEPS = 8


def trained(model, optimizer, recipe, clip=None, micro_batches=None):
    """Trains by the recipe; clip: of a dense optimiser, which does not do it itself."""
    scheduler = None
    if recipe["one_cycle"]:  # the learning rate rises and falls, and momentum the other way
        cycle = recipe["sgd"]["momentum"] > 0
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS, cycle_momentum=cycle)
    parts = recipe["micro_batches"] if micro_batches is None else micro_batches
    sign = -1 if recipe["sgd"]["maximize"] else 1
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(recipe["seed"] + step)
        x = torch.randn(6, 3, 6, 6, dtype=f64, generator=generator)
        y = torch.randn(6, 16, dtype=f64, generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            for images, targets in zip(x.chunk(parts), y.chunk(parts)):
                (sign * (model(images) - targets).square().mean() / parts).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    return tdlrt.to_dense(model).state_dict()


def assert_near(one, two):
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=0, atol=1e-9), name


@settings(deadline=None, max_examples=25, derandomize=True)
@given(recipes(), st.sampled_from(["one_pass", "two_pass", "parallel"]), st.sampled_from(["channels", "all"]))
def test_full_rank_is_dense_sgd_whatever_the_recipe(recipe, integrator, modes):
    check_against_dense_sgd(recipe, integrator, modes)


def check_against_dense_sgd(recipe, integrator, modes):
    dense = small_network(recipe["seed"])
    model = tdlrt.tuckerize(copy.deepcopy(dense), modes=modes, min_features=0)
    options = {**recipe["sgd"], "tol": 0.0, "integrator": integrator, "max_grad_norm": recipe["limit"]}
    found = trained(model, tdlrt.TDLRT(model, **options), recipe)
    expected = trained(dense, torch.optim.SGD(dense.parameters(), **recipe["sgd"]), recipe, clip=recipe["limit"])
    assert_near(expected, found)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(recipes(), st.sampled_from(["channels", "all"]), st.sampled_from([0.0, None]))
def test_low_rank_is_two_passes_over_one_batch_whatever_the_recipe(recipe, modes, tol):
    """With the momentum outside the bases, which full rank has none of; at tolerances that no rounding can tip."""
    results = []
    for integrator, micro_batches in (("one_pass", None), ("two_pass", 1)):
        model = tdlrt.tuckerize(small_network(recipe["seed"]), ranks=2, modes=modes, min_features=0)
        options = {**recipe["sgd"], "tol": tol, "max_rank": 3, "max_grad_norm": recipe["limit"]}
        optimizer = tdlrt.TDLRT(model, integrator=integrator, **options)
        results.append(trained(model, optimizer, recipe, micro_batches=micro_batches))
    assert_near(*results)


def test_the_recipes_see_planted_mistakes(monkeypatch):
    from tdlrt import momentum

    recipe = {"sgd": {"lr": 0.05, "momentum": 0.9, "maximize": False}, "limit": 0.1, "micro_batches": 1}
    recipe = {**recipe, "one_cycle": True, "seed": 0}
    check_against_dense_sgd(recipe, "one_pass", "all")
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(tdlrt.TDLRT, "clip", lambda self, expansions: None)
        check_against_dense_sgd(recipe, "one_pass", "all")
    ends, advance = [], momentum.advance
    for clipped in (True, False):  # the momentum outside the bases has a part in what is trained
        monkeypatch.setattr(momentum, "advance", lambda m, g, group, c=1.0: advance(m, g, group, c if clipped else 1.0))
        model = tdlrt.tuckerize(small_network(0), ranks=2, min_features=0)
        optimizer = tdlrt.TDLRT(model, tol=None, max_grad_norm=recipe["limit"], **recipe["sgd"])
        ends.append(trained(model, optimizer, recipe))
    with pytest.raises(AssertionError):
        assert_near(*ends)


def test_the_properties_see_a_planted_mistake(monkeypatch):
    from tdlrt import pairs

    def swapped(self, e):
        gradient = self.core_gradient(e.bases, e.core.shape)
        return gradient.flip(0)

    monkeypatch.setattr(pairs.Pairs, "augmented_gradient", swapped)
    with pytest.raises((AssertionError, RuntimeError)):
        test_one_pass_and_two_pass_agree()
