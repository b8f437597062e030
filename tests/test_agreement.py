"""What one pass refuses: gradients that are no multiple of what the kept inputs and output gradients give."""

import copy

import pytest
import tdlrt
import torch
from test_optimizer import backward, batch, network, same, snapshot
from torch import nn

PENALTIES = {"squares": lambda weight: (weight**2).sum(), "sum_of_sizes": lambda weight: weight.abs().sum()}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_the_weight_is_exact_or_refused_by_one_pass_and_taken_by_two_pass(penalty):
    """The gradient of the sum of squares lies in the old core, which the backward pass gives: that one is exact."""
    weights = []
    for integrator in ("one_pass", "two_pass"):
        model = network()
        optimizer = tdlrt.TDLRT(model, lr=1e-3, integrator=integrator)
        losses = []

        def closure(model=model, optimizer=optimizer, losses=losses):
            optimizer.zero_grad()
            x, y = batch()
            loss = nn.functional.cross_entropy(model(x), y) + PENALTIES[penalty](model[6].weight)
            loss.backward()
            losses.append(loss.item())
            return loss

        if integrator == "one_pass" and penalty == "sum_of_sizes":
            buffers = {n for n, _ in model.named_buffers()}
            before = [v.clone() for n, v in model.state_dict().items() if n not in buffers]
            with pytest.raises(RuntimeError, match=r"gradients of 6 .*two_pass"):
                optimizer.step(closure)
            assert same(before, [v for n, v in model.state_dict().items() if n not in buffers])
            continue
        optimizer.step(closure)
        weights.append(tdlrt.to_dense(model).state_dict())
        optimizer.step(closure)
        assert losses[-1] < losses[0]
    if len(weights) == 2:
        assert all(torch.allclose(v.double(), weights[1][k].double(), atol=1e-12) for k, v in weights[0].items())


def _noise(tensor):
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(3))


def _new_part(factor, direction):
    """The part of the direction outside the factor."""
    return direction - factor @ (factor.T @ direction)


# What may have happened to the gradients of one layer between the backward pass and the step.
CHANGES = {
    "only_the_core_clipped": lambda layer: layer.core.grad.mul_(0.9),
    "only_the_factors_scaled": lambda layer: [f.grad.mul_(0.9) for f in layer.factors if f is not None],
    "one_factor_scaled": lambda layer: layer.factors[1].grad.mul_(1.1),
    "noise_on_the_core": lambda layer: layer.core.grad.add_(0.05 * layer.core.grad.norm() * _noise(layer.core)),
    "half_of_the_core_dropped": lambda layer: layer.core.grad[: layer.core.shape[0] // 2].zero_(),
    "entries_of_the_core_clamped": lambda layer: layer.core.grad.clamp_(
        -layer.core.grad.abs().mean(), layer.core.grad.abs().mean()
    ),
    "noise_outside_a_basis": lambda layer: layer.factors[0].grad.add_(
        0.05 * layer.factors[0].grad.norm() * _new_part(layer.factors[0].data, _noise(layer.factors[0]))
    ),
    "one_column_turned": lambda layer: layer.factors[0].grad[:, 0].neg_(),
}


@pytest.mark.parametrize("integrator", ["one_pass", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_by_more_than_a_scaling_are_refused(change, dtype, integrator):
    model = network(dtype=dtype)
    optimizer = tdlrt.TDLRT(model, lr=0.1, integrator=integrator)
    backward(model, batch(dtype=dtype))
    before = snapshot(model, optimizer)
    CHANGES[change](model[6])
    with pytest.raises(RuntimeError, match=r"gradients of 6 .*two_pass"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))


def test_gradients_that_vanish_outside_the_bases_give_the_scale_by_the_core():
    """U ∇_{U_i} L then holds rounding alone; the block of the old core, contracted again, tells the scale."""
    layer = tdlrt.TuckerLinear(9, 8, bias=False, ranks=3, dtype=torch.float64)
    U, V = (f.detach() for f in layer.factors)
    inside = U @ torch.randn(3, 3, dtype=torch.float64) @ V.T
    tiny = 1e-13 * torch.randn(8, 9, dtype=torch.float64)
    for factor in (1.0, 0.125):
        twin = copy.deepcopy(layer)
        optimizer = tdlrt.TDLRT(twin, lr=0.5, tol=0.0)
        (twin(torch.eye(9, dtype=torch.float64)) * (inside + tiny).T).sum().backward()
        for p in twin.parameters():
            p.grad.mul_(factor)
        before = twin.weight.detach()
        optimizer.step()
        assert torch.allclose(twin.weight, before - 0.5 * factor * inside, rtol=0, atol=1e-12)


def test_gradients_zeroed_in_place_after_an_abandoned_pass_are_refused_with_the_remedy():
    """`model.zero_grad(set_to_none=False)` does not tell the optimiser, which still has the pairs of that pass."""
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    backward(model, batch(0))
    model.zero_grad(set_to_none=False)
    backward(model, batch(1))
    with pytest.raises(RuntimeError, match=r"zeroed in place: use the optimizer's zero_grad\(\)"):
        optimizer.step()


@pytest.mark.parametrize("integrator", ["one_pass", "parallel"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_core_gradient_that_overflowed_is_named_as_not_finite(value, integrator):
    """As half precision may leave it beside finite gradients of the factors: no disagreement, and a step to skip."""
    model = nn.Sequential(tdlrt.TuckerLinear(9, 8, ranks=1, dtype=torch.float64), nn.Tanh())
    optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, integrator=integrator)
    model(_noise(torch.empty(4, 9, dtype=torch.float64))).square().sum().backward()
    before = snapshot(model, optimizer)
    model[0].core.grad[0, 0] = value
    with pytest.raises(tdlrt.NonFiniteError, match=r"the gradient of 0\.core holds NaN or Inf"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_a_penalty_is_refused_and_rounding_is_not(dtype):
    for penalty in (0.0, 1.0):
        model = network(dtype=torch.float32)
        optimizer = tdlrt.TDLRT(model, lr=0.1)
        x, y = batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        (loss + penalty * model[6].weight.abs().sum()).backward()
        if not penalty:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=r"gradients of 6 .*two_pass"):
            optimizer.step()
