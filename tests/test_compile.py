"""`torch.compile` of models with Tucker layers: no graph break in the forward pass, and the same training."""

import copy

import pytest
import tdlrt
import torch
from tdlrt import compiled
from torch import nn

# The convolution has what changes code paths: a 3×3 window of stride 1, padding outside the operator, batch norm.
GEOMETRY = {"padding": "same", "padding_mode": "circular"}


def network(path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, **GEOMETRY)),
        *(nn.Flatten(), nn.Linear(12 * 16, 10)),
    )
    model = tdlrt.tuckerize(model, ranks=0.4, min_features=8)
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


@pytest.mark.parametrize("path", ["chain", "reconstruct"])
@pytest.mark.parametrize("integrator", ["one_pass", "parallel"])
def test_kept_pairs_come_out_of_one_graph(integrator, path):
    eager, model = network(path), network(path)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert trained(model, forward, integrator, 4) == pytest.approx(trained(eager, eager, integrator, 4), rel=1e-4)
    assert tdlrt.ranks(model) == tdlrt.ranks(eager)


@pytest.mark.long
@pytest.mark.parametrize("integrator", ["one_pass", "two_pass"])
def test_code_that_inductor_generates_trains_as_the_eager_model(integrator):
    """Generated C++ around the operators, of layers and of their backward passes, at ranks that change."""
    eager, model = network("auto"), network("auto")
    forward = torch.compile(model, fullgraph=True)
    assert trained(model, forward, integrator, 4) == pytest.approx(trained(eager, eager, integrator, 4), rel=1e-4)
    assert tdlrt.ranks(model) == tdlrt.ranks(eager)
    for a, b in zip(tdlrt.to_dense(model).parameters(), tdlrt.to_dense(eager).parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


class Reused(nn.Module):
    """Layers called twice, outputs changed in place, an embedding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.relu, self.table = nn.ReLU(inplace=True), nn.Embedding(10, 12)
        self.dense, self.head = nn.Linear(12 * 16, 12), nn.Linear(12, 12)

    def forward(self, x):
        x = self.relu(self.second(self.relu(self.first(x))))
        x = torch.tanh(self.dense((x + self.second(x)).flatten(1)))
        return self.head(torch.tanh(self.head(x))) + self.table(torch.arange(len(x)))


@pytest.mark.parametrize("retain", ["deferred", "inline"])
def test_reused_layers_and_micro_batches_in_one_graph(retain):
    ends = []
    for in_one_graph in (False, True):
        torch.manual_seed(0)
        model = tdlrt.tuckerize(Reused(), ranks=0.4, min_features=8, embeddings=True)
        optimizer = tdlrt.TDLRT(model, lr=0.05, momentum=0.9, tol=0.05, retain=retain)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if in_one_graph else model
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2 if retain == "deferred" else 1):
                generator = torch.Generator().manual_seed(10 * step + part)
                x = torch.randn(4, 8, 4, 4, generator=generator)
                nn.functional.cross_entropy(forward(x), torch.arange(4)).backward()
            optimizer.step()
        ends.append(tdlrt.to_dense(model).state_dict())
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, rtol=0, atol=1e-5), name


def test_a_copy_of_a_compiled_model_keeps_nothing():
    model = network("chain")
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.05)
    twin = copy.deepcopy(model)
    torch.compile(twin, backend="aot_eager", fullgraph=True)(torch.randn(4, 8, 4, 4)).sum().backward()
    assert not any(optimizer.kept.calls(layer) for layer in optimizer.layers.values())


@pytest.mark.parametrize(("flip", "words"), [(False, "none of its calls was seen"), (True, "not a multiple")])
def test_a_graph_without_pairs_or_with_wrong_ones_is_noticed(flip, words, monkeypatch):
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return compiled.keep_pair(input.flip(0), grad, ctx.recorder) if flip else grad, None, None

    monkeypatch.setattr(compiled.Kept, "backward", staticmethod(backward))
    model = network("chain")
    with pytest.raises(RuntimeError, match=words):
        trained(model, torch.compile(model, backend="aot_eager", fullgraph=True), "one_pass", 1)
