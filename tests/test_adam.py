"""Adam with one second moment for a whole core, against its formula on the weight, where bases are whole."""

import pytest
import tdlrt
import torch
from quadratic import whole_rank

OPTIONS = [
    {},
    {"betas": (0.7, 0.9), "eps": 0.1},
    {"maximize": True},
    {"base": "adam", "weight_decay": 0.3},
    {"base": "adamw", "weight_decay": 0.3},
    {"base": "adamw", "weight_decay": 0.3, "maximize": True},
    {"amsgrad": True, "betas": (0.5, 0.3)},
    {"lr": torch.tensor(0.05)},
    {"base": torch.optim.AdamW, "weight_decay": 0.0},
]


class Reference:
    """The formula, Kingma & Ba 2015 with the mean of g² in place of every entry's; weight decay as torch's."""

    def __init__(self, lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False, amsgrad=False, base=""):
        self.lr, self.betas, self.eps, self.decay = float(lr), betas, eps, weight_decay
        self.maximize, self.amsgrad, self.apart = maximize, amsgrad, base == "adamw"
        self.m = self.v = self.largest = self.t = 0

    def __call__(self, W, g):
        self.t += 1
        g = -g if self.maximize else g
        if self.apart:
            W = W * (1 - self.lr * self.decay)
        else:
            g = g + self.decay * W
        first, second = self.betas
        self.m = first * self.m + (1 - first) * g
        self.v = second * self.v + (1 - second) * float(g.square().mean())
        self.largest = max(self.largest, self.v)
        v = (self.largest if self.amsgrad else self.v) / (1 - second**self.t)
        return W - self.lr * self.m / (1 - first**self.t) / (v**0.5 + self.eps)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_where_bases_are_whole_it_is_the_formula_on_the_weight(options):
    layer, loss, target = whole_rank()
    made = {"lr": 0.05, "base": "adam", **options}
    optimizer, reference = tdlrt.TDLRT(layer, tol=None, **made), Reference(**{"lr": 0.05, **options})
    W = layer.weight.detach().clone()
    for scale in (1.0, 3.0, 0.01, 1.0, 0.1):  # second moments that fall, too
        W = reference(W, 2 * scale * (W - target))
        optimizer.zero_grad()
        loss(scale).backward()
        optimizer.step()
        assert torch.allclose(layer.weight.detach(), W, rtol=0, atol=1e-12)
    assert optimizer.state[layer.core]["exp_avg_sq"].shape == ()


def test_second_moments_by_entry_are_read_as_their_mean():
    """Those of a state that torch's Adam made."""
    layer, loss, _ = whole_rank()
    optimizer = tdlrt.TDLRT(layer, lr=0.05, base="adam", betas=(0.9, 1.0 - 1e-12), tol=None)
    loss().backward()
    optimizer.step()
    stored = optimizer.state_dict()
    place = list(optimizer.state).index(layer.core)
    entries = torch.rand(layer.core.shape, dtype=torch.float64)
    stored["state"][place]["exp_avg_sq"] = entries
    optimizer.load_state_dict(stored)
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    assert torch.allclose(optimizer.state[layer.core]["exp_avg_sq"], entries.mean(), rtol=1e-6, atol=0)
