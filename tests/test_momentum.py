"""Momentum outside the bases: a tangent vector that truncation keeps, against the tangent projection written out."""

from types import SimpleNamespace

import pytest
import tdlrt
import torch
from oracles import multiply, tangent_projection, unfold
from quadratic import Quadratic, random_tucker
from tdlrt import momentum, transport

SHAPE, RANKS = (9, 8, 7), (3, 3, 2)


class EntrywiseAdam(torch.optim.Adam):
    """A base of somebody else's, which keeps a second moment for every entry of a core."""


def orthonormal(n, m):
    return torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]


def augmented(dtype=torch.float64, smallest=1.0):
    """(what `bring_in` needs of an expansion, M ×_{j≠i} U_jᵀ unfolded for every i, of a random M)."""
    factors = [orthonormal(n, r) for n, r in zip(SHAPE, RANKS)]
    bases = [torch.cat([U, orthonormal(len(U), len(U))[:, : U.shape[1]]], 1) for U in factors]
    bases = [torch.linalg.qr(B)[0] for B in bases]
    factors = [B[:, :r] for B, r in zip(bases, RANKS)]
    core = torch.randn(RANKS, dtype=torch.float64)
    for mode in range(3):
        core.movedim(mode, 0)[-1] *= smallest
    M = torch.randn(SHAPE, dtype=torch.float64)
    parts = [unfold(multiply(M, [U.T for U in factors], skip=i), i) for i in range(3)]
    e = SimpleNamespace(
        core=core.to(dtype),
        factors=[U.to(dtype) for U in factors],
        bases=[B.to(dtype) for B in bases],
        shape=tuple(2 * r for r in RANKS),
        known_block=tuple(slice(0, r) for r in RANKS),
    )
    return e, [K.to(dtype) for K in parts]


def state_of(buffer, outside):
    return {"momentum_buffer": buffer, momentum.OUTSIDE: outside}


def test_blocks_are_the_tangent_projection_in_the_new_directions():
    e, parts = augmented()
    buffer = torch.zeros(e.shape, dtype=torch.float64)
    momentum.bring_in([(e, state_of(buffer, [K @ unfold(e.core, i).T for i, K in enumerate(parts)]))])
    for i, K in enumerate(parts):
        r = RANKS[i]
        rows = torch.linalg.qr(unfold(e.core, i).T)[0]
        block = unfold(buffer[tuple(slice(r, None) if j == i else slice(0, RANKS[j]) for j in range(3))], i)
        assert torch.allclose(block, e.bases[i][:, r:].T @ K @ rows @ rows.T, rtol=0, atol=1e-11)
        buffer[tuple(slice(r, None) if j == i else slice(0, RANKS[j]) for j in range(3))] = 0
    assert not buffer.any()


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_carried_momentum_never_grows(dtype, smallest):
    """Even where the core is nearly or exactly deficient; a zero core has no tangent directions but itself."""
    e, parts = augmented(dtype, smallest)
    for core in (e.core, torch.zeros_like(e.core)):
        e.core = core
        for i, K in enumerate(parts):
            buffer = torch.zeros(e.shape, dtype=dtype)
            outside = [K @ unfold(core, i).T if j == i else None for j in range(3)]
            momentum.bring_in([(e, state_of(buffer, outside))])
            assert buffer.norm() <= K.norm() * (1 + 1e-5)


BASES = {"sgd": ("momentum_buffer", {"momentum": 0.9}), "adam": ("exp_avg", {"base": "adam"})}


def distance_to_the_tangent_projection(base, lr, steps=4):
    """Of what is kept after some steps, from the projection of the dense momentum ∝ Σ μᵏ ∇_W L; relative."""
    buffer, options = BASES[base]
    problem = Quadratic(ranks=(3, 3, 2, 2), seed=1)
    optimizer = tdlrt.TDLRT(problem.layer, lr=lr, tol=None, **options)
    dense = torch.zeros(problem.shape, dtype=torch.float64)
    for _ in range(steps):
        dense = 0.9 * dense + (0.1 if base == "adam" else 1.0) * (problem.weight() - problem.target)
        problem.step(optimizer)
    core, factors = problem.layer.core.detach(), [f.detach() for f in problem.layer.factors]
    state = optimizer.state[problem.layer.core]
    kept = multiply(state[buffer], factors)
    for i, m in enumerate(state[momentum.OUTSIDE]):
        shape = [n for j, n in enumerate(core.shape) if j != i]
        block = (m @ torch.linalg.pinv(unfold(core, i)).T).reshape(len(m), *shape).movedim(0, i)
        kept = kept + multiply(block, factors, skip=i)
    want = tangent_projection(dense, core, factors)
    return ((kept - want).norm() / want.norm()).item()


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_tangent_part_of_the_dense_momentum_to_first_order(base):
    far, near = distance_to_the_tangent_projection(base, 1e-3), distance_to_the_tangent_projection(base, 1e-4)
    assert far < 0.1
    assert near < 0.2 * far


def test_carried_along_it_stays_outside_the_basis():
    B, P, m = orthonormal(9, 6), orthonormal(6, 2), torch.randn(9, 3, dtype=torch.float64)
    U, new = B[:, :3], B @ P
    want = (torch.eye(9, dtype=torch.float64) - new @ new.T) @ m @ (U.T @ new)
    _, (carried,) = transport.project_states([], [(m, P)])
    momentum.take_out([carried], [new])
    assert torch.allclose(carried, want, rtol=0, atol=1e-13)


def loss_after(steps, lr, **options):
    target = random_tucker((12, 10, 3, 3), (3, 3, 3, 3), seed=3)
    problem = Quadratic(n_out=12, n_in=10, ranks=(3, 3, 3, 3), target=target, seed=5)
    optimizer = tdlrt.TDLRT(problem.layer, lr=lr, tol=None, **options)
    return [problem.step(optimizer) for _ in range(steps)][-1]


# At the larger rate, what the basis holds must not count twice.
@pytest.mark.parametrize(("base", "lr"), [("sgd", 0.02), ("sgd", 0.05), ("adam", 0.05)])
def test_training_is_faster_with_it(monkeypatch, base, lr):
    fast = loss_after(45, lr, **BASES[base][1])
    monkeypatch.setattr(momentum, "advance", lambda m, gradient, *_: gradient)
    monkeypatch.setattr(momentum, "bring_in", lambda moving: [state.pop(momentum.OUTSIDE) for _, state in moving])
    assert fast < 0.5 * loss_after(45, lr, **BASES[base][1])


def test_maximize_goes_the_same_way():
    ends = []
    for sign in (1, -1):
        problem = Quadratic(seed=1)
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.02, momentum=0.9, tol=None, maximize=sign < 0)
        for _ in range(6):
            optimizer.zero_grad()
            (sign * problem.loss()).backward()
            optimizer.step()
        ends.append(problem.weight())
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


def test_steps_of_the_core_alone_let_it_decay():
    problem = Quadratic()
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.02, momentum=0.9, tol=None, basis_every=3)
    problem.step(optimizer)
    before = optimizer.state[problem.layer.core][momentum.OUTSIDE]
    problem.step(optimizer)
    after = optimizer.state[problem.layer.core][momentum.OUTSIDE]
    assert any(m.norm() > 0 for m in before)
    for old, new in zip(before, after):
        assert torch.equal(new, 0.9 * old)


@pytest.mark.parametrize("options", [{"base": "adam", "betas": (0.0, 0.999)}, {"base": torch.optim.NAdam}, {}])
def test_without_momentum_there_is_nothing_to_keep(options):
    problem = Quadratic()
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.02, tol=None, **options)
    problem.step(optimizer)
    assert momentum.OUTSIDE not in optimizer.state[problem.layer.core]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("base", "basis_every", "lr", "steps", "left"),
    [
        ("adamw", 1, 0.03, 200, 1e-7),
        ("adamw", 4, 0.1, 100, 0.01),
        (EntrywiseAdam, 1, 0.03, 200, 1e-4),
        (EntrywiseAdam, 4, 0.03, 100, 0.02),
    ],
)
def test_adam_turns_bases_towards_a_target_of_their_rank(base, basis_every, lr, steps, left, seed):
    """By entry, with second moments of zero in new directions, 1e-3 was left, and with basis_every=4 a tenth.

    With one moment for a core basis_every=4 wants the larger rate: at 0.03 it leaves a third.
    """
    target = random_tucker((20, 16, 3, 3), (3, 3, 2, 2), seed=seed + 10)
    problem = Quadratic(20, 16, (3, 3, 2, 2), target=target, seed=seed)
    optimizer = tdlrt.TDLRT(problem.layer, lr=lr, tol=None, base=base, basis_every=basis_every)
    losses = [problem.step(optimizer) for _ in range(steps)]
    assert losses[-1] < left * losses[0]


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"amsgrad": True}, {"betas": (0.0, 0.99)}])
def test_new_blocks_step_along_their_gradient(options):
    """By the learning rate times the steps it stands for, over the root of the known block's mean second moment."""
    problem = Quadratic()
    optimizer = tdlrt.TDLRT(problem.layer, lr=1e-3, tol=None, base=EntrywiseAdam, basis_every=2, **options)
    for _ in range(2):
        problem.step(optimizer)
    core, seen = problem.layer.core, {}
    known = optimizer.state[core]["exp_avg_sq"].mean()
    step = optimizer.base.step

    def watched():
        seen["gradient"], seen["before"] = core.grad.clone(), core.detach().clone()
        step()
        seen["moved"] = core.detach() - seen["before"]

    optimizer.base.step = watched
    problem.step(optimizer)
    new = torch.ones_like(seen["moved"], dtype=torch.bool)
    new[:3, :3, :2, :2] = False
    assert new.sum() > 100
    gradient, moved = seen["gradient"][new], seen["moved"][new]
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    second = (beta2 * known + (1 - beta2) * gradient**2) / (1 - beta2**3)
    if options.get("amsgrad"):
        second = second.clamp(min=known / (1 - beta2**3))
    wanted = -1e-3 * (2 if beta1 else 1) * gradient / (second.sqrt() + 1e-8)
    assert torch.allclose(moved, -wanted if options.get("maximize") else wanted, rtol=1e-9, atol=1e-12)


def test_it_is_in_the_state_dict():
    ends = []
    for interrupted in (False, True):
        problem = Quadratic(seed=2)
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.02, momentum=0.9, tol=0.05)
        for step in range(6):
            if interrupted and step == 3:
                saved = problem.layer.state_dict(), optimizer.state_dict()
                problem = Quadratic(seed=4)
                optimizer = tdlrt.TDLRT(problem.layer, lr=0.5, momentum=0.9, tol=0.05)
                problem.layer.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                problem.target = Quadratic(seed=2).target
            problem.step(optimizer)
        ends.append(problem.weight())
    assert torch.equal(*ends)


def test_it_is_clipped_with_the_gradients():
    kept = []
    for limit in (None, 0.5):
        problem = Quadratic()
        optimizer = tdlrt.TDLRT(problem.layer, lr=1e-9, momentum=0.9, tol=None, max_grad_norm=limit)
        problem.step(optimizer)
        kept.append(optimizer.state[problem.layer.core])
    plain, clipped = (torch.linalg.vector_norm(state["momentum_buffer"]) for state in kept)
    assert clipped < plain
    for whole, part in zip(*(state[momentum.OUTSIDE] for state in kept)):
        assert torch.allclose(part, whole * (clipped / plain), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{"dampening": 0.3}, {"maximize": True}, {"dampening": 0.3, "maximize": True}, {}])
def test_what_is_kept_outside_is_what_sgd_would_keep(options):
    compare_with_torch(torch.optim.SGD, "momentum_buffer", {"momentum": 0.9, **options})


@pytest.mark.parametrize("options", [{"maximize": True}, {"betas": (0.6, 0.9)}, {}])
def test_what_is_kept_outside_is_what_adam_would_keep(options):
    compare_with_torch(torch.optim.Adam, "exp_avg", options)


def compare_with_torch(kind, key, options):
    p = torch.zeros(4, 3, requires_grad=True)
    optimizer = kind([p], lr=0.0, **options)
    m = None
    for _ in range(3):
        p.grad = torch.randn(4, 3)
        gradient = p.grad.clone()
        optimizer.step()
        m = momentum.advance(m, gradient, optimizer.param_groups[0])
        assert torch.allclose(m, optimizer.state[p][key])


def test_a_mode_that_was_full_for_a_while_starts_from_rest():
    """At full rank nothing is outside the bases; what was there before is not found again when the rank shrinks."""
    layer = tdlrt.TuckerLinear(8, 8, bias=False, ranks=5, dtype=torch.float64)
    optimizer = tdlrt.TDLRT(layer, lr=0.05, momentum=0.9)
    x, y = torch.randn(2, 30, 8, dtype=torch.float64)
    for tol, full in ((0.0, True), (0.0, True), (0.5, False), (0.1, False), (0.1, False)):
        optimizer.param_groups[0]["tol"] = tol
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        assert (layer.ranks == (8, 8)) is full
    for m, factor in zip(optimizer.state[layer.core][momentum.OUTSIDE], layer.factors, strict=True):
        assert m.shape == factor.shape
