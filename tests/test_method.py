"""The numbered properties of the method: what the mathematics promises, whatever the singular values.

The formulas here are written out with torch.linalg and einsum, not with the package's operators.
"""

import copy
import importlib
import math

import pytest
import tdlrt
import torch
from oracles import multiply, tangent_projection
from quadratic import Quadratic, random_tucker
from torch import nn


def state_of(problem):
    return problem.layer.core.detach().clone(), [f.detach().clone() for f in problem.layer.factors]


def augmented_gradient_norm(problem):
    """‖∇_C̃ L‖ read off a step of size λ without truncation: W₁ = W₀ − λ ∇_C̃ L ×_i U⁺."""
    before = problem.weight()
    optimizer = tdlrt.TDLRT(problem.layer, lr=1e-3, tol=0.0)
    problem.step(optimizer)
    return torch.linalg.vector_norm(problem.weight() - before) / 1e-3


@pytest.mark.parametrize("integrator", ["one_pass", "two_pass"])
def test_1_augmentation_leaves_the_weight_unchanged(integrator):
    problem = Quadratic()
    before = problem.weight()
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.0, tol=0.0, integrator=integrator)

    def closure():
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    if integrator == "two_pass":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    assert torch.linalg.vector_norm(problem.weight() - before) <= 1e-14 * torch.linalg.vector_norm(before)


@pytest.mark.parametrize("seed", range(3))
def test_2_gradient_norms_are_ordered(seed):
    problem = Quadratic(seed=seed)
    core, factors = state_of(problem)
    G = problem.weight() - problem.target  # ∇L of ½‖W − W*‖²
    projected = torch.linalg.vector_norm(tangent_projection(G, core, factors))
    old_core = torch.linalg.vector_norm(multiply(G, [U.T for U in factors]))
    augmented = augmented_gradient_norm(problem)
    assert augmented >= projected * (1 - 1e-12)
    assert projected >= old_core * (1 - 1e-12)
    assert augmented > old_core * 1.05  # the directions V add something


def test_2_the_oracle_is_a_projector():
    problem = Quadratic()
    core, factors = state_of(problem)
    Z = torch.randn(problem.shape, dtype=torch.float64)
    once = tangent_projection(Z, core, factors)
    assert torch.allclose(tangent_projection(once, core, factors), once, atol=1e-12)
    assert abs((Z * once).sum() - (once * once).sum()) < 1e-10  # self-adjoint: ⟨Z, PZ⟩ = ‖PZ‖²


@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_3_descent(lr, seed):
    problem = Quadratic(seed=seed)
    core, factors = state_of(problem)
    projected = tangent_projection(problem.weight() - problem.target, core, factors)
    before = problem.step(tdlrt.TDLRT(problem.layer, lr=lr, tol=0.0))
    after = problem.loss().item()
    assert after <= before - lr / 2 * (projected**2).sum().item() + 1e-10


@pytest.mark.parametrize("tol", [0.6, 0.3, 0.1])
@pytest.mark.parametrize("tolerance_mode", ["global", "per_mode"])
def test_4_truncation_error_is_bounded(tol, tolerance_mode):
    exact, cut = Quadratic(), Quadratic()
    exact.step(tdlrt.TDLRT(exact.layer, lr=0.5, tol=0.0))
    optimizer = tdlrt.TDLRT(cut.layer, lr=0.5, tol=tol, tolerance_mode=tolerance_mode)
    cut.step(optimizer)
    W, truncated = exact.weight(), cut.weight()
    delta = torch.linalg.vector_norm(W - truncated)
    worst = tol * (1 if tolerance_mode == "global" else math.sqrt(4))
    assert delta <= worst * torch.linalg.vector_norm(W) * (1 + 1e-12)
    relative = optimizer.truncation_errors[""]
    assert delta == pytest.approx(relative * torch.linalg.vector_norm(W).item(), rel=1e-9)
    gradient = torch.linalg.vector_norm(W - exact.target)
    assert cut.loss() <= exact.loss() + gradient * delta + delta**2 / 2 + 1e-10
    if tol == 0.6:
        assert cut.layer.ranks != exact.layer.ranks  # something was truncated


def test_5_gauge_invariance():
    plain, rotated = Quadratic(), Quadratic()
    core, factors = state_of(plain)
    rotations = [torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for r in core.shape]
    rotated.layer.assign(multiply(core, [R.T for R in rotations]), [U @ R for U, R in zip(factors, rotations)])
    assert torch.allclose(plain.weight(), rotated.weight(), atol=1e-12)
    optimizers = [tdlrt.TDLRT(p.layer, lr=0.3, tol=0.05, momentum=0.9) for p in (plain, rotated)]
    for _ in range(5):
        for problem, optimizer in zip((plain, rotated), optimizers):
            problem.step(optimizer)
    assert plain.layer.ranks == rotated.layer.ranks
    assert torch.allclose(plain.weight(), rotated.weight(), atol=1e-10)


def orthonormal_range(A):
    # A plain QR would complete a rank-deficient [K|U] with directions that mean nothing.
    left, sigma, _ = torch.linalg.svd(A, full_matrices=False)
    return left[:, sigma > 1e-11 * sigma[0]]


def matrix_dlrt_step(U, S, V, gradient, lr, tol):
    """The rank-adaptive matrix integrator (Ceruti, Kusch & Lubich 2022), written directly: K-, L- and S-step."""
    G = gradient(U @ S @ V.T)
    U_new = orthonormal_range(torch.cat([U @ S - lr * G @ V, U], 1))
    V_new = orthonormal_range(torch.cat([V @ S.T - lr * G.T @ U, V], 1))
    S_new = (U_new.T @ U) @ S @ (V.T @ V_new)
    S_new = S_new - lr * U_new.T @ gradient(U_new @ S_new @ V_new.T) @ V_new
    P, sigma, Qh = torch.linalg.svd(S_new)
    tail = (sigma**2).flip(0).cumsum(0).flip(0)
    # Two modes share the tolerance: each discards at most tol²/2.
    rank = max(1, int((tail > tol**2 / 2 * (sigma**2).sum()).sum()))
    return U_new @ P[:, :rank], torch.diag(sigma[:rank]), V_new @ Qh.T[:, :rank]


def test_6_two_modes_are_matrix_dlrt():
    torch.manual_seed(0)
    target = torch.randn(12, 4, dtype=torch.float64) @ torch.randn(4, 10, dtype=torch.float64)
    target += 0.05 * torch.randn(12, 10, dtype=torch.float64)
    layer = tdlrt.TuckerLinear(10, 12, bias=False, ranks=3, dtype=torch.float64)
    U, V = (f.detach().clone() for f in layer.factors)
    S = layer.core.detach().clone()
    optimizer = tdlrt.TDLRT(layer, lr=0.2, tol=0.05)
    inputs = torch.eye(10, dtype=torch.float64)
    ranks = set()
    for _ in range(15):
        optimizer.zero_grad()
        (0.5 * ((layer(inputs) - target.T) ** 2).sum()).backward()
        optimizer.step()
        U, S, V = matrix_dlrt_step(U, S, V, lambda W: W - target, 0.2, 0.05)
        assert layer.ranks == tuple(S.shape)
        assert torch.allclose(layer.weight, U @ S @ V.T, atol=1e-10)
        ranks.add(layer.ranks)
    assert len(ranks) > 1  # the test saw the rank adapt


def plain_factor_descent(core, factors, target, lr, steps):
    """Gradient descent on (C, U_1, …, U_d) as independent parameters."""
    parameters = [core.clone().requires_grad_(), *(U.clone().requires_grad_() for U in factors)]
    for _ in range(steps):
        loss = 0.5 * ((multiply(parameters[0], parameters[1:]) - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p -= lr * g
    return 0.5 * ((multiply(parameters[0].detach(), [p.detach() for p in parameters[1:]]) - target) ** 2).sum()


def test_7_small_singular_values_do_not_slow_it_down():
    shape, ranks, steps, lr = (9, 7, 3, 3), (3, 3, 3, 3), 40, 0.2
    target = random_tucker(shape, ranks, spectrum=[2.0, 1.5, 1.0], seed=5)

    def run(spectrum):
        problem = Quadratic(ranks=ranks, target=target, seed=1)
        core = torch.zeros(ranks, dtype=torch.float64)
        for i, s in enumerate(spectrum):
            core[i, i, i, i] = s
        problem.layer.core.data.copy_(core)
        start = state_of(problem)
        optimizer = tdlrt.TDLRT(problem.layer, lr=lr, tol=None)
        for _ in range(steps):
            problem.step(optimizer)
        return problem.loss().item(), plain_factor_descent(*start, target, lr, steps).item()

    well, _ = run([1.0, 0.9, 0.8])
    ill, plain_ill = run([1.0, 1e-4, 1e-8])
    initial = 0.5 * (target**2).sum().item()
    assert ill < 1e-3 * initial
    assert abs(ill - well) < 1e-3 * initial
    assert plain_ill > 10 * ill + 0.02 * initial  # plain descent on the factors stalls


@pytest.mark.parametrize("start", [1, 3])
def test_8_the_true_rank_is_found(start):
    true = (2, 2, 2, 2)
    target = random_tucker((9, 7, 3, 3), true, spectrum=[3.0, 2.0], seed=3)
    problem = Quadratic(ranks=(start,) * 4, target=target, seed=2)
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.3, tol=0.02)
    for _ in range(80):
        problem.step(optimizer)
    assert problem.layer.ranks == true
    assert problem.loss().item() < 1e-3 * 0.5 * (target**2).sum().item()


# ---- one pass equals two; full rank equals dense ----------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16 * 9, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    ).double()


def train(model, optimizer, data, two_pass=False):
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        torch.manual_seed(int(y.sum()))  # the same dropout masks for every optimiser
        if two_pass:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def batches(count, size=8, shape=(3, 12, 12), classes=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, dtype=torch.float64, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("modes", ["channels", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05, "tol": 0.02, "momentum": 0.9, "nesterov": True},
        # Adam divides by the size of each entry; a large eps keeps it from turning rounding noise into a step.
        {"lr": 0.003, "tol": 0.02, "base": "adamw", "eps": 1e-2},
        {"lr": 0.05, "tol": 0.1, "base": "muon", "eps": 1e-2},
    ],
    ids=str,
)
@pytest.mark.usefixtures("linear_layers")
def test_one_pass_equals_two_pass(modes, options):
    dense = network()
    models, histories = [], []
    for integrator in ("one_pass", "two_pass"):
        model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=0.4, modes=modes, min_features=0)
        optimizer = tdlrt.TDLRT(model, weight_decay=1e-3, integrator=integrator, **options)
        history = [tdlrt.ranks(model)]
        for batch in batches(10):
            train(model, optimizer, [batch], two_pass=integrator == "two_pass")
            history.append(tdlrt.ranks(model))
        models.append(model)
        histories.append(history)
    assert histories[0] == histories[1]
    assert len({str(h) for h in histories[0]}) > 1  # ranks did change on the way
    one, two = (tdlrt.to_dense(m).state_dict() for m in models)
    for name in one:  # parameters and batch-norm statistics
        assert torch.allclose(one[name].double(), two[name].double(), rtol=0, atol=1e-10), name


def test_full_rank_is_dense_sgd():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 6),
    ).double()
    for modes in ("channels", "all"):
        expected = copy.deepcopy(dense)
        model = tdlrt.tuckerize(copy.deepcopy(dense), modes=modes, min_features=0)
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
        data = batches(20, shape=(4, 8, 8), classes=6)
        train(expected, torch.optim.SGD(expected.parameters(), **options), data)
        train(model, tdlrt.TDLRT(model, tol=0.0, **options), data)
        result = tdlrt.to_dense(model).state_dict()
        for name, value in expected.state_dict().items():
            assert torch.allclose(result[name], value, rtol=0, atol=1e-9), name


def test_full_rank_rectangular_linear_is_dense_sgd_without_momentum():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model = tdlrt.tuckerize(copy.deepcopy(dense), min_features=0)
    data = batches(20, shape=(9,), classes=4)
    train(dense, torch.optim.SGD(dense.parameters(), lr=0.1, weight_decay=1e-2), data)
    train(model, tdlrt.TDLRT(model, lr=0.1, weight_decay=1e-2, tol=0.0), data)
    for name, value in dense.state_dict().items():
        assert torch.allclose(tdlrt.to_dense(model).state_dict()[name], value, rtol=0, atol=1e-9), name


# ---- the oracles fail on planted mistakes -----------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["known_block_only", "wrong_transport", "unprojected"])
def test_planted_mistakes_are_caught(monkeypatch, mistake):
    from tdlrt import expansion

    one_pass = importlib.import_module("tdlrt.integrators.one_pass")

    if mistake == "known_block_only":  # the new blocks of the augmented gradient left out
        original = one_pass.augmented_gradient

        def broken(e, pairs):
            total = original(e, pairs)
            block = tuple(slice(0, n) for n in e.core.shape)
            kept = torch.zeros_like(total)
            kept[block] = total[block]
            return kept

        monkeypatch.setattr(one_pass, "augmented_gradient", broken)
    elif mistake == "wrong_transport":  # momentum cut off instead of rotated
        monkeypatch.setattr(
            expansion,
            "project_states",
            lambda moving, momenta: (
                [
                    {
                        k: v[tuple(slice(0, n if p is None else p.shape[1]) for n, p in zip(shape, P))].clone()
                        for k, v in state.items()
                    }
                    for state, shape, P in moving
                ],
                [m @ P[: m.shape[1]] for m, P in momenta],
            ),
        )
    else:  # the gradient itself used as the new basis, without projection or orthonormalisation
        monkeypatch.setattr(
            expansion.tk,
            "tangent_basis",
            lambda U, D: ([d / d.norm(dim=0) for d in D], torch.tensor([d.shape[1] for d in D])),
        )
    with pytest.raises((AssertionError, RuntimeError)):
        if mistake == "unprojected":
            test_1_augmentation_leaves_the_weight_unchanged("one_pass")
            test_3_descent(1.0, 0)
        test_one_pass_equals_two_pass("channels", {"lr": 0.05, "tol": 0.02, "momentum": 0.9})
        test_6_two_modes_are_matrix_dlrt()
        test_full_rank_is_dense_sgd()
