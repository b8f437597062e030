"""Adapters: W0 + Tucker, trained by the same step and folded in at the end."""

import copy
import io
import logging

import pytest
import tdlrt
import torch
from torch import nn


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Tanh(), nn.Conv2d(12, 10, 3, stride=2, bias=False)),
        *(nn.Flatten(), nn.Linear(10 * 4, 9), nn.Tanh(), nn.Linear(9, 8)),
    ).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 8, (6,), generator=generator)


def train(model, steps, integrator="one_pass", **options):
    options = {"lr": 0.2, "momentum": 0.9, "tol": 0.05, **options}
    optimizer = tdlrt.TDLRT(model, integrator=integrator, **options)
    x, y = batch(next(model.parameters()).dtype)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
    return losses


@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize("integrator", ["one_pass", "two_pass", "standard", "parallel"])
def test_the_dense_weights_stay_and_the_sum_learns(integrator, modes):
    dense = network()
    model = tdlrt.adapt(copy.deepcopy(dense), ranks=2, modes=modes, min_features=4)
    x, _ = batch()
    assert torch.equal(model(x), dense(x)), "a zero core changes nothing"
    model, dense = model.eval(), dense.eval()  # batch norm's statistics would change too
    before = copy.deepcopy(dense.state_dict())
    losses = train(model, 1, integrator)
    assert any(bool(m.core.any()) for m in model.modules() if isinstance(m, tdlrt.TuckerConv2d)), "the first step moves"
    losses += train(model, 25, integrator)
    assert losses[-1] < 0.1 * losses[0]
    assert tdlrt.orthogonality_error(model) < 1e-12
    for name, module in model.named_modules():
        if isinstance(module, tdlrt.TuckerAdapter):
            assert torch.equal(module.base.weight, before[f"{name}.weight"])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_one_pass_equals_two_pass_from_the_zero_core_on():
    found = []
    for options in ({}, {"retain": "inline"}, {"integrator": "two_pass"}):
        model = tdlrt.adapt(network(), ranks=2, min_features=4)
        train(model, 4, **options)
        found.append(tdlrt.to_dense(model).state_dict())
    for name, value in found[2].items():
        assert torch.allclose(value, found[0][name], rtol=0, atol=1e-10), name
        assert torch.allclose(value, found[1][name], rtol=0, atol=1e-10), name


def test_a_full_rank_adapter_is_dense_training():
    """At full ranks and tol=0 the sum takes the steps of SGD on the dense weight, bias and norm frozen."""
    dense = network().eval()
    model = tdlrt.adapt(copy.deepcopy(dense), ranks=1.0, min_features=4).eval()
    dense.requires_grad_(False)
    for i in (0, 3):
        dense[i].weight.requires_grad_(True)
    for i in (5, 7):  # a rectangular matrix cannot have both ranks full
        model[i].delta.requires_grad_(False)
    train(model, 8, tol=0.0)
    optimizer = torch.optim.SGD([dense[0].weight, dense[3].weight], lr=0.2, momentum=0.9)
    x, y = batch()
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(dense(x), y).backward()
        optimizer.step()
    for i in (0, 3):
        assert torch.allclose(model[i].weight, dense[i].weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)])
def test_merging_rounds_once(dtype, unit):
    model = tdlrt.adapt(network(dtype), ranks=3, min_features=4)
    train(model, 5)
    exact = {}
    for name, module in model.named_modules():
        if isinstance(module, tdlrt.TuckerAdapter):
            subscripts = "abcd,ia,jb->ijcd" if module.delta.core.ndim == 4 else "ab,ia,jb->ij"
            operands = (module.delta.core, *[f for f in module.delta.factors if f is not None])
            exact[name] = module.base.weight.double() + torch.einsum(subscripts, *[t.double() for t in operands])
    x, _ = batch(dtype)
    model.eval()
    y = model(x)
    copied = tdlrt.to_dense(model)
    merged = tdlrt.merge(model)
    assert merged is model
    assert not [m for m in model.modules() if isinstance(m, (tdlrt.TuckerAdapter, tdlrt.TuckerConv2d))]
    for name, weight in exact.items():
        module = merged.get_submodule(name)
        slack = 1e-14 * weight.abs().max()  # of the sums in float64
        assert ((module.weight.double() - weight).abs() <= unit * weight.abs() + slack).all()
        assert torch.equal(copied.get_submodule(name).weight, module.weight)
    assert torch.allclose(merged(x), y, rtol=0, atol=1e3 * unit)


def test_a_state_dict_brings_its_ranks_into_an_adapted_model():
    model = tdlrt.adapt(network(), ranks=2, min_features=4)
    train(model, 4)
    x, _ = batch()
    model.eval()
    other = tdlrt.adapt(network(), ranks=5, min_features=4).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    small = tdlrt.adapter_state_dict(model)
    assert len(small) == 4 * 3
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    fresh = tdlrt.adapt(network(), ranks=1, min_features=4)
    missing = fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=False)
    assert not missing.unexpected_keys
    fresh[1].load_state_dict(model[1].state_dict())
    assert torch.equal(fresh.eval()(x), model(x))


def test_what_gets_an_adapter_and_what_is_counted(caplog):
    model = network()
    with caplog.at_level(logging.INFO, logger="tdlrt"):
        tdlrt.adapt(model, ranks={"3": 2, "*": 0.5}, skip=("7",))
    assert [n for n, m in model.named_modules() if isinstance(m, tdlrt.TuckerAdapter)] == ["3", "5"]
    assert any("left dense: 0" in message and "min_features" in message for message in caplog.messages)
    assert any("left dense: 7" in message for message in caplog.messages)
    assert tdlrt.ranks(model)["3.delta"] == (2, 2, 3, 3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.delta.{part}" for i in (3, 5) for part in ("core", "factors.0", "factors.1")}
    size = tdlrt.compression(model)
    assert size.dense_parameters == sum(p.numel() for p in network().parameters())
    assert size.factorised_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [d.name for d in tdlrt.plan(model, min_features=0)] == ["0", "7"], "an adapter is not adapted again"
    assert torch.equal(model[3].weight, model[3].base.weight)
    assert tdlrt.adapt(nn.Linear(9, 9)).bias.shape == (9,)
    untouched = network()
    with pytest.raises(ValueError, match="ranks is 0"):
        tdlrt.adapt(untouched, ranks=0)
    assert all(p.requires_grad for p in untouched.parameters())


def test_a_dict_of_ranks_names_what_is_adapted(caplog):
    with caplog.at_level(logging.INFO, logger="tdlrt"):
        model = tdlrt.adapt(network(), ranks={"5": 2, "7": None})
    assert tdlrt.ranks(model) == {"5.delta": (2, 2)}
    assert "left dense: 3 (ranks does not name it)" in caplog.messages
    assert "left dense: 7 (ranks does not name it)" in caplog.messages
    assert not any(p.requires_grad for i in (0, 1, 3, 7) for p in model[i].parameters())
    with pytest.raises(ValueError, match=r"ranks names 'q_proj', .*there are 0, 3, 5, 7"):
        tdlrt.adapt(network(), ranks={"q_proj": 2})


def test_the_small_checkpoint_has_all_that_was_trained():
    def headed():
        model = tdlrt.adapt(network(), ranks=2, min_features=4, skip=("7",)).eval()
        model[7].requires_grad_(True)
        return model

    model, x = headed(), batch()[0]
    train(model, 3)
    small = tdlrt.adapter_state_dict(model)
    assert {name for name in small if "delta" not in name} == {"7.weight", "7.bias"}
    fresh = headed()
    first, second = tdlrt.adapter_state_dict(copy.deepcopy(fresh)), fresh(x)
    assert not fresh.load_state_dict(small, strict=False).unexpected_keys
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(first, strict=False)
    assert torch.equal(fresh(x), second), "adapters are exchanged by loading"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_its_dtype(dtype):
    model = tdlrt.adapt(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)).to(dtype), ranks=3)
    assert model[0].base.weight.dtype == dtype
    assert model[0].delta.core.dtype == torch.float32
    x = torch.randn(5, 16, dtype=dtype)
    y = torch.randn(5, 8, dtype=dtype)
    optimizer = tdlrt.TDLRT(model, lr=0.2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert model[0].weight.dtype == dtype
    assert tdlrt.merge(model)[0].weight.dtype == dtype


def test_without_a_gradient_nothing_is_lost():
    """A layer that sees zeros keeps its zero core, and learns once it sees something."""
    model = tdlrt.adapt(nn.Linear(9, 9, dtype=torch.float64), ranks=4)
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    target = torch.eye(9, dtype=torch.float64)
    for x in (torch.zeros(9, 9, dtype=torch.float64), target, target, target):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
    assert bool(model.delta.core.any())
