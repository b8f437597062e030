"""Ranks of all layers chosen together: budgets, buckets; and the conditioning regulariser."""

import itertools
import math

import pytest
import tdlrt
import torch
from quadratic import Quadratic, random_tucker
from tdlrt.rank_choice import RankChoice, Spectrum
from test_method import batches, network
from torch import nn

f64 = torch.float64


def train(model, optimizer, steps):
    for x, y in batches(steps):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        torch.manual_seed(0)
        optimizer.step(closure)
        yield tdlrt.compression(model)


def tucker(modes="channels"):
    return tdlrt.tuckerize(network(), ranks=0.3, modes=modes, min_features=0)


@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize("integrator", ["one_pass", "parallel", "two_pass"])
@pytest.mark.parametrize("budget_of", ["parameters", "multiply_adds"])
def test_the_budget_is_kept_and_used(modes, integrator, budget_of):
    model = tucker(modes)
    start = getattr(tdlrt.compression(model), budget_of)
    for budget in (int(start * 1.3), int(start * 0.8)):
        optimizer = tdlrt.TDLRT(
            model, lr=0.05, momentum=0.9, tol=None, budget=budget, budget_of=budget_of, integrator=integrator
        )
        for _ in train(model, optimizer, 4):
            now = getattr(tdlrt.compression(model), budget_of)
            assert now <= budget
        assert now >= 0.9 * budget  # one rank costs up to this much here
        for layer in optimizer.layers.values():
            assert all(r * r <= math.prod(layer.ranks) for r in layer.ranks)


def test_a_tolerance_may_stay_below_the_budget():
    one, two = tucker(), tucker()
    list(train(one, tdlrt.TDLRT(one, lr=0.05, tol=0.3), 3))
    list(train(two, tdlrt.TDLRT(two, lr=0.05, tol=0.3, budget=10**9), 3))
    assert tdlrt.ranks(one) == tdlrt.ranks(two)
    for a, b in zip(tdlrt.to_dense(one).parameters(), tdlrt.to_dense(two).parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_multiples_stay_within_max_rank():
    model = tucker()
    optimizer = tdlrt.TDLRT(model, lr=0.05, tol=0.0, rank_multiple=4, max_rank=6)
    list(train(model, optimizer, 2))
    found = [layer.ranks[i] for layer in optimizer.layers.values() for i in layer.modes]
    assert max(found) == 6


@pytest.mark.parametrize("seed", range(6))
def test_the_cut_is_nearly_the_best_of_all(seed):
    """Against every combination of ranks; the objective is the sum over layers of the discarded shares of ‖C‖²."""
    torch.manual_seed(seed)
    model = nn.ModuleList([tdlrt.TuckerLinear(9, 6, ranks=4), tdlrt.TuckerLinear(5, 12, ranks=4)])
    layers = list(model)
    squares = [sorted((torch.rand(4) ** 4 * 10).tolist(), reverse=True) for _ in layers]
    spectra = [Spectrum(x, [s, s], [1, 1], [4, 4], 0.0) for x, s in zip(layers, squares)]
    dense = sum(x.bias.numel() for x in layers)

    def cost(ranks):
        return dense + sum(r * r + r * sum(x.weight_shape) for r, x in zip(ranks, layers))

    def discarded(ranks):
        return sum(sum(s[r:]) / sum(s) for r, s in zip(ranks, squares))

    for budget in range(cost((1, 1)), cost((4, 4)), 9):
        choice = RankChoice(model, 1, budget, "parameters", 1, "global")(spectra)
        ranks = tuple(r for r, _ in choice)
        assert all(a == b for a, b in choice)
        assert cost(ranks) <= budget
        best = min(discarded(r) for r in itertools.product(range(1, 5), repeat=2) if cost(r) <= budget)
        largest = max(s[0] / sum(s) for s in squares)
        assert discarded(ranks) <= best + largest  # greedy: off by no more than one direction


def test_the_layer_that_loses_least_gives_up_its_directions():
    """Of two layers of one size, the one whose spectrum falls faster gives up its directions."""
    torch.manual_seed(0)
    model = nn.Sequential(tdlrt.TuckerLinear(16, 16, ranks=8), nn.Tanh(), tdlrt.TuckerLinear(16, 16, ranks=8)).double()
    for layer, decay in ((model[0], 0.2), (model[2], 0.9)):
        layer.core.data.copy_(torch.diag(decay ** torch.arange(8.0)))
    size = tdlrt.compression(model).parameters
    optimizer = tdlrt.TDLRT(model, lr=1e-12, tol=None, budget=size - 4 * 40)
    model(torch.randn(5, 16, dtype=f64)).sum().backward()
    optimizer.step()
    assert model[2].ranks >= (8, 8)
    assert model[0].ranks <= (4, 4)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("budget", [None, 3000])
def test_ranks_are_multiples_or_the_largest_offered(multiple, budget):
    model = tucker()
    optimizer = tdlrt.TDLRT(model, lr=0.3, tol=0.1, rank_multiple=multiple, budget=budget)
    seen = {layer.ranks for layer in optimizer.layers.values()}
    for _ in train(model, optimizer, 6):
        for layer in optimizer.layers.values():
            for mode in layer.modes:
                rank = layer.ranks[mode]
                largest = min(layer.weight_shape[mode], math.prod(layer.ranks) // rank)
                assert rank % multiple == 0 or rank == largest or rank < multiple, layer
            seen.add(layer.ranks)
        if budget is None:
            assert all(error <= 0.1 + 1e-12 for error in optimizer.truncation_errors.values())
        else:
            assert tdlrt.compression(model).parameters <= budget
    assert len(seen) > len(optimizer.layers)


def test_the_stated_error_is_the_real_one():
    largest_first = {"rank_multiple": 2, "tol": 0.3, "max_rank": 5}
    for options in ({"rank_multiple": 2, "tol": 0.6}, {"budget": 100, "tol": None}, largest_first):
        problem = Quadratic(ranks=(4, 4, 3, 3), target=random_tucker((9, 7, 3, 3), (5, 5, 3, 3), seed=2))
        twin = Quadratic(ranks=(4, 4, 3, 3), target=problem.target)
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, **options)
        twin.step(tdlrt.TDLRT(twin.layer, lr=0.3, tol=0.0))
        problem.step(optimizer)
        whole, cut = twin.weight(), problem.weight()
        error = torch.linalg.vector_norm(whole - cut) / torch.linalg.vector_norm(whole)
        assert error > 1e-3
        assert list(optimizer.truncation_errors.values()) == [pytest.approx(float(error), rel=1e-6)]


def test_impossible_budgets_and_wrong_options():
    model = tucker()
    with pytest.raises(ValueError, match=r"budget is 10; with min_rank=1 the model has \d+ parameters"):
        tdlrt.TDLRT(model, lr=0.1, budget=10)
    for options, words in (
        ({"budget": 0}, "budget is 0"),
        ({"budget": 9999, "budget_of": "bytes"}, "budget_of is 'bytes'"),
        ({"rank_multiple": 0}, "rank_multiple is 0"),
        ({"conditioning": -1.0}, "conditioning is -1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            tdlrt.TDLRT(model, lr=0.1, **options)


@pytest.mark.parametrize("integrator", ["one_pass", "parallel", "two_pass", "standard"])
def test_conditioning_adds_its_gradient_to_the_core(integrator):
    """The new directions have no singular values yet, so W moves by −λβ ∇ of the regulariser in the old bases."""
    weights = []
    for beta in (0.0, 0.3):
        problem = Quadratic(ranks=(3, 4, 3, 2))
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.1, tol=0.0, integrator=integrator, conditioning=beta)

        def closure(problem=problem, optimizer=optimizer):
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss

        start = [p.detach().clone() for p in (problem.layer.core, *problem.layer.factors)]
        optimizer._redo_saturated = lambda expansions: None
        optimizer.step(closure)
        weights.append(problem.weight())
    core = start[0].requires_grad_()
    S = core.flatten(1)
    alpha2 = (S**2).sum() / 3
    regulariser = torch.linalg.matrix_norm(S @ S.T - alpha2 * torch.eye(3, dtype=f64))
    (gradient,) = torch.autograd.grad(regulariser, core)
    for mode, U in enumerate(start[1:]):
        gradient = torch.tensordot(U, gradient, dims=([1], [mode])).movedim(0, mode)
    assert torch.allclose(weights[1] - weights[0], -0.1 * 0.3 * gradient, rtol=0, atol=1e-11)


def test_conditioning_draws_singular_values_together():
    spreads = []
    for beta in (0.0, 0.2):
        problem = Quadratic(ranks=(3, 3, 2, 2), target=random_tucker((9, 7, 3, 3), (3, 3, 2, 2), seed=4))
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.1, tol=None, conditioning=beta)
        for _ in range(30):
            problem.step(optimizer)
        values = torch.linalg.svdvals(problem.layer.core.detach().flatten(1))
        spreads.append(float(values[0] / values[-1]))
    assert spreads[1] < 0.8 * spreads[0]


def test_layers_that_take_no_part_in_a_step_count_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = (tdlrt.TuckerLinear(12, 12, ranks=6, dtype=f64) for _ in range(2))

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Two()
    idle = sum(p.numel() for p in model.idle.parameters())
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=None, budget=idle + 100)
    model(torch.randn(30, 12, dtype=f64)).square().sum().backward()
    optimizer.step()
    assert model.idle.ranks == (6, 6)
    assert tdlrt.compression(model).parameters <= idle + 100


def test_without_competition_ranks_are_those_of_the_tolerance():
    """RankChoice finds them from singular values, `hosvd_truncate` by itself."""
    for mode in ("global", "per_mode"):
        ranks = []
        for options in ({}, {"budget": 10**9}):
            problem = Quadratic(ranks=(4, 4, 3, 3), target=random_tucker((9, 7, 3, 3), (5, 5, 3, 3), seed=2))
            optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=0.35, tolerance_mode=mode, **options)
            for _ in range(3):
                problem.step(optimizer)
            ranks.append(problem.layer.ranks)
        assert ranks[0] == ranks[1]
        assert ranks[0] < (8, 7, 3, 3)


def test_rounded_ranks_stay_below_the_product_of_the_others():
    layer = tdlrt.TuckerConv2d(9, 12, (1, 2), ranks=(6, 3, 1, 2))
    squares = [[4.0, 3.0, 2.0, 1.0, 1.0, 1.0], [12.0, 1e-9, 1e-9], [12.0], [6.0, 6.0]]
    choose = RankChoice(layer, 1, None, "parameters", 1, "global")
    assert choose([Spectrum(layer, squares, [1, 1, 1, 2], [6, 3, 1, 2], 0.01)]) == [(2, 1, 1, 2)]
