"""The embedding with a Tucker weight, against `nn.Embedding`."""

import copy
import logging

import pytest
import tdlrt
import torch
from torch import nn


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("modes", ["all", (0,), (1,), ()])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_it_is_the_dense_one_at_full_rank(modes, shape):
    torch.manual_seed(0)
    dense = nn.Embedding(13, 8, dtype=torch.float64)
    layer = tdlrt.TuckerEmbedding.from_dense(dense, modes=modes)
    indices = torch.randint(0, 13, shape)
    for each in (layer, layer.to_dense(), layer.to_sequential()):
        assert_same(each(indices), dense(indices))


@pytest.mark.parametrize("modes", ["all", (0,), (1,), ()])
def test_core_gradient_is_the_projected_weight_gradient(modes):
    torch.manual_seed(1)
    layer = tdlrt.TuckerEmbedding(13, 8, ranks=3, modes=modes, dtype=torch.float64)
    indices = torch.randint(0, 13, (4, 6))  # some of them twice
    dense = layer.to_dense()
    y = dense(indices)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, dense.weight, dy)
    bases = [None if f is None else torch.linalg.qr(torch.randn(len(f), 5).double())[0] for f in layer.factors]
    for mode, basis in enumerate(bases):
        if basis is not None:
            expected = torch.tensordot(basis.T, expected, dims=([1], [mode])).movedim(0, mode)
    assert_same(layer.core_gradient(indices, dy, bases), expected)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.body = nn.Linear(12, 16)
        self.head = nn.Linear(16, 30)

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embedding(x))))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_one_pass_equals_two_pass(scale):
    """Also with a scaled loss, whose gradients are unscaled before the step."""
    found = []
    for integrator in ("one_pass", "two_pass"):
        torch.manual_seed(2)
        model = tdlrt.tuckerize(Language().double(), ranks=4, embeddings=True, min_features=8)
        optimizer = tdlrt.TDLRT(model, lr=0.5, momentum=0.9, tol=1e-4, integrator=integrator)
        x = torch.randint(0, 30, (7, 5))

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            (loss * scale).backward()
            for p in model.parameters():
                p.grad = None if p.grad is None else p.grad / scale
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(6)]
        assert losses[-1] < losses[0]
        assert tdlrt.orthogonality_error(model) < 1e-13
        found.append((tdlrt.ranks(model), tdlrt.to_dense(model).state_dict()))
    assert found[0][0] == found[1][0]
    assert found[0][0]["embedding"] != (4, 4), "the ranks move"
    for name, value in found[0][1].items():
        assert torch.allclose(value, found[1][1][name], rtol=0, atol=1e-10), name


def test_which_embeddings_are_replaced(caplog):
    model = Language()
    tied = copy.deepcopy(model)
    tied.head = nn.Linear(12, 30)
    tied.head.weight = tied.embedding.weight
    unasked = tdlrt.tuckerize(copy.deepcopy(model), ranks=4, min_features=8)
    assert not hasattr(unasked.embedding, "core")
    with caplog.at_level(logging.INFO, logger="tdlrt"):
        tdlrt.tuckerize(tied, ranks=4, embeddings=True, min_features=8)
    assert isinstance(tied.embedding, nn.Embedding)
    assert any("embedding" in message and "shared" in message for message in caplog.messages)
    (decision,) = tdlrt.plan(nn.Embedding(30, 16, padding_idx=0), embeddings=True)
    assert decision.reason == "embedding with padding_idx=0"
    with pytest.raises(ValueError, match="sparse=True"):
        tdlrt.TuckerEmbedding.from_dense(nn.Embedding(30, 12, sparse=True))
    replaced = tdlrt.tuckerize(model, ranks=4, embeddings=True, min_features=8)
    counts = tdlrt.compression(replaced)
    assert counts.multiply_adds == 4 * (4 + 12) + 4 * (12 + 4 + 16) + 4 * (16 + 4 + 30)
    assert counts.dense_multiply_adds == 12 * 16 + 16 * 30
    ratio = torch.linalg.vector_norm(tdlrt.TuckerEmbedding(300, 40, ranks=9).weight) / (300 * 40) ** 0.5
    assert abs(float(ratio.detach()) - 1) < 1e-5


def test_autocast_leaves_indices_alone():
    layer = tdlrt.TuckerEmbedding(30, 12, ranks=4)
    indices = torch.arange(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(indices)
    assert (y.float() - layer.weight).abs().max() < 0.05 * layer.weight.abs().max()
