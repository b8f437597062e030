"""`torch.compile` of models with Tucker layers: no graph break in the forward pass, and the same training."""

import pytest
import tdlrt
import torch
from torch import nn

# The convolution has what changes code paths: a 3×3 window of stride 1, padding outside the operator, batch norm.
GEOMETRY = {"padding": "same", "padding_mode": "circular"}


def network(path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, **GEOMETRY)),
        *(nn.Flatten(), nn.Linear(12 * 16, 10)),
    )
    model = tdlrt.tuckerize(model, ranks=0.4)
    for i in (0, 3, 5):
        model[i].path = path
    return model


def trained(model, forward, integrator, steps):
    """Loss of every step, with adaptive ranks; the shapes differ between most evaluations."""
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05, integrator=integrator)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 8, 4, 4, generator=generator), torch.arange(4)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
    return losses


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("path", ["auto", "reconstruct"])
def test_two_pass_trains_in_one_graph(path):
    eager, model = network(path), network(path)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = trained(eager, eager, "two_pass", 5)
    found = trained(model, forward, "two_pass", 5)
    assert found == pytest.approx(expected, rel=1e-4)
    assert tdlrt.ranks(model) == tdlrt.ranks(eager)


def test_one_pass_trains_with_a_break_at_each_tucker_layer():
    """Its hooks keep tensors in Python, which no graph can hold; without fullgraph that costs breaks and no error."""
    eager, model = network("chain"), network("chain")
    expected = trained(eager, eager, "one_pass", 4)
    found = trained(model, torch.compile(model, backend="aot_eager"), "one_pass", 4)
    assert found == pytest.approx(expected, rel=1e-4)
    assert tdlrt.ranks(model) == tdlrt.ranks(eager)
