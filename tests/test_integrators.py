"""The integrators against each other and against what their papers promise."""

import copy
import importlib
import itertools

import pytest
import tdlrt
import torch
from quadratic import Quadratic, random_tucker
from test_method import batches, network
from torch import nn


def train(model, optimizer, data):
    losses = []
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        torch.manual_seed(int(y.sum()))
        losses.append(optimizer.step(closure).item())
    return losses


def weights(model):
    return tdlrt.to_dense(model).state_dict()


def close(one, two, tolerance):
    return all(torch.allclose(v.double(), two[k].double(), rtol=0, atol=tolerance) for k, v in one.items())


@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize("tol", [0.02, None])
def test_the_standard_algorithm_agrees_with_one_pass(modes, tol):
    """[K − λ∇_K L | U] and [U | ∇_U L] span the same space, so d + 1 gradients give what one gives."""
    results, histories = [], []
    for integrator in ("one_pass", "standard"):
        # At lower window ranks gradients are exactly rank-deficient, and which noise is kept as a direction differs.
        model = tdlrt.tuckerize(network(), ranks=0.7 if modes == "all" else 0.4, modes=modes, min_features=0)
        optimizer = tdlrt.TDLRT(model, lr=0.05, momentum=0.9, weight_decay=1e-3, tol=tol, integrator=integrator)
        histories.append([[*train(model, optimizer, [b]), str(tdlrt.ranks(model))] for b in batches(5)])
        results.append(weights(model))
    assert [h[-1] for h in histories[0]] == [h[-1] for h in histories[1]]
    assert close(*results, 1e-9)


def test_parallel_drops_exactly_the_blocks_with_two_new_modes():
    torch.manual_seed(0)
    layer = tdlrt.TuckerLinear(9, 8, bias=False, ranks=3, dtype=torch.float64)
    target = torch.randn(8, 9, dtype=torch.float64)
    U, V = (f.detach().clone() for f in layer.factors)
    C = layer.core.detach().clone()
    G = U @ C @ V.T - target
    optimizer = tdlrt.TDLRT(layer, lr=0.1, tol=0.0, integrator="parallel")
    optimizer._redo_saturated = lambda expansions: None  # tol = 0 saturates every rank; here the raw step is wanted
    (0.5 * ((layer(torch.eye(9, dtype=torch.float64)) - target.T) ** 2).sum()).backward()
    optimizer.step()

    def outside(basis, direction):
        return direction - basis @ (basis.T @ direction)

    new_u = torch.linalg.qr(outside(U, G @ V))[0]
    new_v = torch.linalg.qr(outside(V, G.T @ U))[0]
    expected = U @ (C - 0.1 * U.T @ G @ V) @ V.T
    expected -= 0.1 * new_u @ new_u.T @ G @ V @ V.T + 0.1 * U @ U.T @ G @ new_v @ new_v.T
    assert torch.allclose(layer.weight, expected, rtol=0, atol=1e-12)


def test_parallel_is_first_order_close_to_one_pass():
    """The dropped blocks have size O(λ): halving λ quarters the distance only if they enter at second order."""
    distances = []
    for lr in (0.02, 0.01):
        points = []
        for integrator in ("one_pass", "parallel"):
            problem = Quadratic(ranks=(3, 3, 2, 2), target=random_tucker((9, 7, 3, 3), (3, 3, 2, 2), seed=1))
            problem.step(tdlrt.TDLRT(problem.layer, lr=lr, tol=0.02, integrator=integrator))
            points.append(problem.weight())
        distances.append(torch.linalg.vector_norm(points[0] - points[1]))
    assert distances[1] < 0.6 * distances[0]


def test_a_saturated_parallel_step_is_done_again_with_the_full_gradient():
    points = []
    for integrator in ("one_pass", "parallel"):
        problem = Quadratic(ranks=(1, 1, 1, 1))
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=0.0, integrator=integrator, momentum=0.9)
        for _ in range(2):
            problem.step(optimizer)
        points.append((problem.layer.ranks, problem.weight(), optimizer.state[problem.layer.core]["momentum_buffer"]))
    assert points[0][0] == points[1][0] == (4, 4, 3, 3)
    assert torch.allclose(points[0][1], points[1][1], rtol=0, atol=1e-12)
    assert torch.allclose(points[0][2].norm(), points[1][2].norm(), rtol=1e-12)


@pytest.mark.parametrize("integrator", ["one_pass", "parallel", "two_pass", "standard"])
@pytest.mark.parametrize("options", [{"basis_every": 3}, {"basis_every": 2, "rank_every": 2}], ids=str)
def test_bases_and_ranks_move_on_their_own_steps_only(integrator, options):
    model = tdlrt.tuckerize(network(), ranks=0.4, min_features=0)
    optimizer = tdlrt.TDLRT(model, lr=0.3, momentum=0.9, tol=0.1, integrator=integrator, **options)
    layer = model[3]
    moved, ranks = [], [layer.ranks]
    for data in batches(6):
        before = layer.factors[0].detach().clone()
        core = layer.core.detach().clone()
        train(model, optimizer, [data])
        after = layer.factors[0].detach()
        moved.append(before.shape != after.shape or not torch.equal(before, after))
        ranks.append(layer.ranks)
        assert core.shape != layer.core.shape or not torch.equal(core, layer.core)
        assert tdlrt.orthogonality_error(model) < 1e-13
    every = options["basis_every"]
    assert moved == [i % every == 0 for i in range(6)]
    if "rank_every" in options:
        assert ranks[3] == ranks[4] == ranks[1]  # step 2 moved the bases at fixed ranks
    assert optimizer.steps == 6


@pytest.mark.parametrize("integrator", ["one_pass", "parallel", "two_pass", "standard"])
@pytest.mark.parametrize("name", ["0.core", "3.bias"])
def test_a_step_of_cores_alone_refuses_what_is_not_finite(name, integrator):
    model = tdlrt.tuckerize(network(), ranks=0.4, min_features=0).eval()
    optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, basis_every=2, integrator=integrator)
    (first, (x, y)) = batches(2)
    train(model, optimizer, [first])
    before = [v.clone() for v in model.state_dict().values()]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        model.get_parameter(name).grad.view(-1)[0] = float("nan")
        return loss

    with pytest.raises(tdlrt.NonFiniteError, match=f"the gradient of {name} holds NaN or Inf"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


def test_frozen_bases_leave_a_step_of_cores():
    problem = Quadratic(ranks=(3, 3, 2, 2))
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=0.05)
    problem.step(optimizer)
    optimizer.freeze_bases()
    factors = [f.detach().clone() for f in problem.layer.factors]
    losses = [problem.step(optimizer) for _ in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(factors, problem.layer.factors))
    best = problem.target  # the core then solves a linear least-squares problem
    for mode, U in enumerate(factors):
        best = torch.tensordot(U @ U.T, best, dims=([1], [mode])).movedim(0, mode)
    assert losses[-1] == pytest.approx(0.5 * ((best - problem.target) ** 2).sum().item(), rel=1e-9)
    optimizer.freeze_bases(False)
    problem.step(optimizer)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(factors, problem.layer.factors))


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_clipping_by_the_augmented_norm(limit):
    plain, clipped = Quadratic(), Quadratic()
    start = plain.weight()
    plain.step(tdlrt.TDLRT(plain.layer, lr=1e-2, tol=0.0))
    clipped.step(tdlrt.TDLRT(clipped.layer, lr=1e-2, tol=0.0, max_grad_norm=limit))
    full, short = plain.weight() - start, clipped.weight() - start
    norm = torch.linalg.vector_norm(full) / 1e-2
    assert torch.allclose(short, full * min(1.0, limit / norm), rtol=0, atol=1e-7)
    assert torch.linalg.vector_norm(short) <= 1e-2 * limit * (1 + 1e-9)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaled_loss_gives_the_same_step(overflow):
    torch.manual_seed(0)
    model = nn.Sequential(tdlrt.TuckerLinear(12, 10, ranks=4), nn.ReLU(), nn.Linear(10, 3))
    twin = copy.deepcopy(model)
    optimizer, plain = (tdlrt.TDLRT(m, lr=0.1, momentum=0.9, tol=0.02) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 12)
    for m, o in ((model, optimizer), (twin, plain)):
        loss = (m(x) ** 2).mean()
        if m is model:
            scaler.scale(loss).backward()
            if overflow:
                model[2].weight.grad[0, 0] = float("inf")
            before = copy.deepcopy(model.state_dict())
            scaler.step(o)
            scaler.update()
        else:
            loss.backward()
            o.step()
    if overflow:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert optimizer.steps == 0
    else:
        assert close(weights(model), weights(twin), 1e-6)


def test_every_integrator_learns():
    for integrator in ("one_pass", "two_pass", "standard", "parallel"):
        target = random_tucker((9, 7, 3, 3), (3, 3, 2, 2), seed=4)
        problem = Quadratic(ranks=(1, 1, 1, 1), target=target)
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.4, tol=0.02, integrator=integrator)

        def closure(problem=problem, optimizer=optimizer):
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss

        for _ in range(60):
            optimizer.step(closure)
        assert problem.loss().item() < 2e-3 * 0.5 * (target**2).sum().item(), integrator
        assert problem.layer.ranks == (3, 3, 2, 2), integrator


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_standard_takes_the_gradient_at_its_own_point_where_no_basis_can_grow(momentum):
    """Its last evaluation before that was in K-form, where the core's gradient is another one."""
    found = []
    x = torch.randn(9, 6, dtype=torch.float64)
    start = tdlrt.TuckerLinear(6, 6, dtype=torch.float64)  # both ranks full
    for integrator in ("standard", "two_pass"):
        layer = copy.deepcopy(start)
        optimizer = tdlrt.TDLRT(layer, lr=0.3, momentum=momentum, tol=None, integrator=integrator)

        def closure(layer=layer, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (layer(x) - x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        found.append(layer.weight.detach())
    assert torch.allclose(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", [{"momentum": 0.9}, {"base": "adam", "lr": 0.05}], ids=["sgd", "adam"])
@pytest.mark.parametrize("change", ["clipped", "scaled"])
def test_a_step_done_again_is_clipped_scaled_and_counted_once(change, base):
    points = []
    for integrator in ("one_pass", "parallel"):
        problem = Quadratic(ranks=(1, 1, 1, 1))
        how = {"max_grad_norm": 2.0} if change == "clipped" else {}
        optimizer = tdlrt.TDLRT(problem.layer, **{"lr": 0.3, "tol": 0.0, "integrator": integrator, **how, **base})
        for _ in range(2):
            optimizer.zero_grad()
            (problem.loss() * (64 if change == "scaled" else 1)).backward()
            for p in problem.layer.parameters():
                p.grad /= 64 if change == "scaled" else 1
            if change == "clipped" and integrator == "one_pass":
                # The norm that clips is that of the gradient tried first, where only one mode is new.
                optimizer.clip = lambda expansions, own=optimizer: _clip_by_one_mode_blocks(own, expansions)
            optimizer.step()
        assert problem.layer.ranks == (4, 4, 3, 3)
        state = optimizer.state[problem.layer.core]
        points.append((problem.weight(), state.get("step")))
    assert torch.allclose(points[0][0], points[1][0], rtol=0, atol=1e-9)
    assert points[0][1] == points[1][1]


def _clip_by_one_mode_blocks(optimizer, expansions):
    for e in expansions:
        tried = e.layer.core.grad.clone()
        for modes in itertools.combinations(e.new_modes, 2):
            tried[tuple(slice(r, None) if i in modes else slice(None) for i, r in enumerate(e.core.shape))] = 0
        e.layer.core.grad *= (optimizer.max_grad_norm / (tried.norm() + 1e-6)).clamp(max=1.0)


def test_a_step_is_not_done_again_with_a_gradient_that_is_not_finite(monkeypatch):
    """The blocks that the first try leaves out may overflow alone: that try stands."""
    parallel = importlib.import_module("tdlrt.integrators.parallel")  # the attribute of the package is the function
    true = parallel.augmented_gradient

    def overflowing(e, pairs):
        gradient = true(e, pairs)
        gradient[tuple(slice(r, None) for r in e.core.shape)] = torch.inf
        return gradient

    points = []
    for redone in (False, True):
        problem = Quadratic(ranks=(1, 1, 1, 1))
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=0.0, integrator="parallel", momentum=0.9)
        if redone:
            monkeypatch.setattr(parallel, "augmented_gradient", overflowing)
        else:
            optimizer._redo_saturated = lambda expansions: None
        problem.step(optimizer)
        points.append(problem.weight())
    assert torch.equal(*points)


@pytest.mark.parametrize("integrator", ["one_pass", "parallel"])
def test_no_activation_outlives_the_step(integrator):
    model = tdlrt.tuckerize(network(), ranks=0.4, min_features=0)
    optimizer = tdlrt.TDLRT(model, lr=0.1, integrator=integrator)
    train(model, optimizer, batches(1))
    assert [optimizer.kept.calls(layer) for layer in optimizer.layers.values()] == [0] * len(optimizer.layers)


def test_ranks_adapt_on_every_so_many_th_step_of_the_bases():
    problem = Quadratic(ranks=(4, 4, 3, 3))
    core, factors = problem.layer.core.detach().clone(), [f.detach().clone() for f in problem.layer.factors]
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.1, tol=0.9, basis_every=2, rank_every=2)
    changed = []
    for _ in range(12):
        problem.layer.assign(core.clone(), [f.clone() for f in factors])
        problem.step(optimizer)
        changed.append(problem.layer.ranks != (4, 4, 3, 3))
    assert changed == [i % 4 == 0 for i in range(12)]
