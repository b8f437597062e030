"""Adam with one second moment for a whole core, against its formula on the weight, where bases are whole."""

import copy

import pytest
import tdlrt
import torch
from quadratic import Quadratic
from tdlrt.layers import TuckerLinear

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


def whole_rank(seed=0):
    torch.manual_seed(seed)
    layer = TuckerLinear(6, 6, bias=False, ranks=6, dtype=torch.float64)
    target = torch.randn(6, 6, dtype=torch.float64)
    return layer, lambda scale=1.0: scale * (layer(torch.eye(6, dtype=torch.float64)).T - target).square().sum(), target


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


@pytest.mark.parametrize("basis_every", [1, 3])
def test_a_step_does_not_see_how_the_weight_is_factorised(basis_every):
    """What a second moment for every entry of the core would."""
    ends = []
    for turned in (False, True):
        problem = Quadratic(seed=3)
        if turned:
            with torch.no_grad():
                for mode, factor in enumerate(problem.layer.factors):
                    r = factor.shape[1]
                    Q = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64, generator=torch.manual_seed(mode)))[0]
                    factor.copy_(factor @ Q)
                    problem.layer.core.copy_(torch.tensordot(Q.T, problem.layer.core, ([1], [mode])).movedim(0, mode))
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.03, tol=0.05, base="adamw", basis_every=basis_every)
        for _ in range(7):
            problem.step(optimizer)
        ends.append(problem.weight())
    assert torch.allclose(*ends, rtol=0, atol=1e-8)


@pytest.mark.parametrize("base", ["adam", "adamw"])
def test_other_parameters_are_stepped_as_by_torch(base):
    torch.manual_seed(0)
    tucker = tdlrt.tuckerize(torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Linear(16, 3)), ranks=4)
    plain = copy.deepcopy(tucker)
    torchs = torch.optim.AdamW if base == "adamw" else torch.optim.Adam
    others = [tucker[0].bias, *tucker[1].parameters()], [plain[0].bias, *plain[1].parameters()]
    ours = tdlrt.TDLRT(tucker, lr=0.01, base=base, weight_decay=0.1, amsgrad=True, tol=None)
    theirs = torchs(others[1], lr=0.01, weight_decay=0.1, amsgrad=True)
    for _ in range(3):
        ours.zero_grad()
        tucker(torch.randn(8, 20)).square().sum().backward()
        for a, b in zip(*others, strict=True):
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        for a, b in zip(*others, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(ours.state[a]["max_exp_avg_sq"], theirs.state[b]["max_exp_avg_sq"])


def test_a_gradient_of_zero_moves_nothing():
    layer, loss, _ = whole_rank()
    optimizer = tdlrt.TDLRT(layer, lr=0.05, base="adamw", weight_decay=0.0, tol=None)
    before = layer.weight.detach().clone()
    loss(0.0).backward()
    optimizer.step()
    assert torch.allclose(layer.weight.detach(), before, rtol=0, atol=1e-14)


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
