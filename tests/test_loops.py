"""Training loops as people write them: backward passes that accumulate nothing, gradients that others clear."""

import copy

import pytest
import tdlrt
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("linear_layers")
X = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 5


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    return tdlrt.tuckerize(model.double(), ranks=0.3, min_features=0)


def loss_of(model, x=X):
    return nn.functional.cross_entropy(model(x), Y)


def ascend(model, x):
    """The input moved up the loss, as adversarial training does; no parameter gets a gradient."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(model, x), x)
    return (x + 0.1 * slope.sign()).detach()


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("retain", ["deferred", "inline"])
@pytest.mark.parametrize("before", ["nothing", "autograd", "model.zero_grad", "loss.grad"])
def test_a_step_sees_the_backward_passes_whose_gradients_are_there(before, retain):
    """What other backward passes leave behind is not part of the step; the oracle is a copy that never ran them."""
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05, retain=retain)
    for _ in range(2):
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        x = ascend(twin, X)
        oracle = tdlrt.TDLRT(twin, lr=0.1, tol=0.05)
        loss_of(twin, x).backward()
        oracle.step()
        if before == "autograd":
            ascend(model, X)
        elif before == "model.zero_grad":
            loss_of(model).backward()
            model.zero_grad()
        elif before == "loss.grad":
            torch.autograd.grad(loss_of(model), list(model.parameters()))
        loss_of(model, x).backward()
        if before == "autograd":  # after the backward pass too
            ascend(model, X)
        optimizer.step()
        assert same(model, twin)


def test_the_discriminator_forgets_the_pass_that_trained_the_generator():
    """`discriminator.zero_grad()`, not the optimiser's, stands between the two."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)).double()
    discriminator = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16)).double()
    models = [tdlrt.tuckerize(m, ranks=0.5, min_features=8) for m in (generator, discriminator)]
    optimizers = [tdlrt.TDLRT(m, lr=0.05, tol=0.1) for m in models]
    z = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer, sign in zip(models, optimizers, (1, -1)):
            model.zero_grad()
            (sign * discriminator(generator(z)).square().mean()).backward()
            optimizer.step()


def test_a_layer_frozen_at_first_is_trained_once_it_is_unfrozen():
    model = network()
    model[2].requires_grad_(False)
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05)
    before = model[2].weight
    for trained in (False, True):
        model[2].requires_grad_(trained)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        assert torch.equal(model[2].weight, before) != trained


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_give_the_same_steps(use_reentrant):
    """The forward pass of a checkpointed part runs twice, its backward pass once."""
    models = [network() for _ in range(2)]
    for checkpointed, model in enumerate(models):
        optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            x = X.clone().requires_grad_()
            run = model
            if checkpointed:

                def run(x, model=model):
                    return torch.utils.checkpoint.checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant)

            loss_of(run, x).backward()
            optimizer.step()
    assert same(*models)


def test_hooks_of_a_copy_or_a_stored_model_are_silent(recwarn, tmp_path):
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        loss_of(other).backward()
    assert not any(optimizer.kept.calls(layer) for layer in optimizer.layers.values())
    assert not recwarn.list
