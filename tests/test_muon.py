"""Muon for cores: polar factors against an SVD, the step against its formula on the weight where bases are whole."""

import math

import pytest
import tdlrt
import torch
from quadratic import Quadratic, random_tucker
from tdlrt.muon import QUINTICS, polar_factors

f64 = torch.float64
SHAPES = [(7, 7), (5, 40), (40, 5), (1, 9), (9, 1), (1, 1)]
SPECTRA = {
    "flat": lambda n: torch.ones(n, dtype=f64),
    "even": lambda n: torch.linspace(1, 0.1, n, dtype=f64),
    "steep": lambda n: torch.logspace(0, -9, n, dtype=f64),
    "rank one": lambda n: torch.tensor([1.0] + [0.0] * (n - 1), dtype=f64),
    "zero": lambda n: torch.zeros(n, dtype=f64),
}


def matrix(shape, spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.linalg.qr(torch.randn(n, min(shape), dtype=f64, generator=generator))[0] for n in shape]
    return sides[0] * SPECTRA[spectrum](min(shape)) @ sides[1].T


def by_svd(matrix):
    """The quintics of the singular values, over the fourth root of the sum of their fourth powers."""
    U, s, V = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.pow(4).sum().pow(0.25).clamp(min=1e-300)
    for a, b, c in QUINTICS:
        s = a * s + b * s**3 + c * s**5
    return U * s @ V


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_polar_factors_are_what_the_quintics_make_of_an_svd(dtype):
    matrices = [matrix(shape, spectrum).to(dtype) for shape in SHAPES for spectrum in SPECTRA]
    found = polar_factors(matrices)
    for m, factor in zip(matrices, found, strict=True):
        assert factor.shape == m.shape
        assert factor.dtype == dtype
        assert torch.allclose(factor.double(), by_svd(m), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("spectrum", ["flat", "even"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_factors_are_near_those_of_an_svd(shape, spectrum):
    m = matrix(shape, spectrum)
    U, _, V = torch.linalg.svd(m, full_matrices=False)
    (found,) = polar_factors([m])
    assert torch.linalg.matrix_norm(found - U @ V, 2) < 0.013


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_polar_factors_do_not_depend_on_the_size_of_the_matrix(size):
    m = matrix((6, 11), "even").float()
    assert torch.allclose(*polar_factors([m]), *polar_factors([size * m]), rtol=0, atol=1e-6)


def test_the_quintics_take_singular_values_to_one():
    s = torch.logspace(-2, 0, 10_001, dtype=f64)
    for a, b, c in QUINTICS:
        s = a * s + b * s**3 + c * s**5
    assert (s - 1).abs().max() < 0.013


class Reference:
    """The formula on the dense weight; torch's own Muon computes in bfloat16."""

    def __init__(self, lr=0.05, betas=(0.9, 0.999), weight_decay=0.0, maximize=False):
        self.lr, self.beta, self.decay, self.maximize = float(lr), betas[0], weight_decay, maximize
        self.m = 0

    def __call__(self, W, gradient):
        gradient = -gradient if self.maximize else gradient
        self.m = self.beta * self.m + (1 - self.beta) * gradient
        rows = W.flatten(1)
        direction = by_svd((self.beta * self.m + (1 - self.beta) * gradient).flatten(1)).view_as(W)
        return W * (1 - self.lr * self.decay) - self.lr * 0.2 * math.sqrt(max(rows.shape)) * direction


LAYERS = {
    "linear": (lambda: tdlrt.TuckerLinear(6, 6, bias=False, dtype=f64), (6,)),
    "linear of four modes": (lambda: tdlrt.TuckerLinear((2, 5), (3, 2), bias=False, dtype=f64), (10,)),
    "convolution": (lambda: tdlrt.TuckerConv2d(3, 5, 3, bias=False, dtype=f64), (3, 3, 3)),
    "all modes": (lambda: tdlrt.TuckerConv2d(5, 4, (1, 3), bias=False, modes="all", dtype=f64), (5, 1, 3)),
}
OPTIONS = [
    {},
    {"betas": (0.5, 0.9)},
    {"betas": (0.0, 0.9)},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "maximize": True},
    {"lr": torch.tensor(0.03, dtype=f64)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_where_bases_are_whole_it_is_the_formula_on_the_weight(kind, options):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    optimizer = tdlrt.TDLRT(layer, tol=None, base="muon", **{"lr": 0.05, **options})
    reference, W = Reference(**options), layer.weight.detach().clone()
    for _ in range(4):
        x = torch.randn(9, *shape, dtype=f64)
        dense = W.clone().requires_grad_()
        forward = torch.nn.functional.linear if W.ndim == 2 else torch.nn.functional.conv2d
        (gradient,) = torch.autograd.grad(forward(x, dense).square().sum(), dense)
        W = reference(W, gradient)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        assert torch.allclose(layer.weight.detach(), W, rtol=0, atol=1e-10)
    assert set(optimizer.state[layer.core]) == {"step", "exp_avg"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("basis_every", [1, 4])
def test_it_turns_bases_towards_a_target_of_their_rank(basis_every, seed):
    """At a rate that falls to zero: the length of a step does not fall by itself."""
    target = random_tucker((20, 16, 3, 3), (3, 3, 2, 2), seed=seed + 10)
    problem = Quadratic(20, 16, (3, 3, 2, 2), target=target, seed=seed)
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=None, base="muon", basis_every=basis_every)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    losses = []
    for _ in range(100):
        losses.append(problem.step(optimizer))
        schedule.step()
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("sizes", [(8, 20), (20, 8)])
def test_a_step_is_as_long_whatever_the_ranks(sizes):
    torch.manual_seed(0)
    layer = tdlrt.TuckerLinear(*sizes, ranks=3, bias=False, dtype=f64)
    optimizer = tdlrt.TDLRT(layer, lr=0.05, tol=0.0, base="muon")
    before = layer.weight.detach().clone()
    layer(torch.eye(sizes[0], dtype=f64)).sub(torch.randn(sizes, dtype=f64)).square().sum().backward()
    optimizer.step()
    lengths = torch.linalg.svdvals(layer.weight.detach() - before)[: max(tdlrt.ranks(layer)[""])]
    assert ((lengths / (0.05 * 0.2 * math.sqrt(20))) - 1).abs().max() < 0.013
