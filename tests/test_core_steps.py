"""What the optimisers have in common that step cores by a rule of their own."""

import copy

import pytest
import tdlrt
import torch
from quadratic import Quadratic, whole_rank

BASES = ("adam", "adamw", "muon")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("basis_every", [1, 3])
def test_a_step_does_not_see_how_the_weight_is_factorised(base, basis_every):
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
        optimizer = tdlrt.TDLRT(problem.layer, lr=0.03, tol=0.05, base=base, basis_every=basis_every)
        for _ in range(7):
            problem.step(optimizer)
        ends.append(problem.weight())
    assert torch.allclose(*ends, rtol=0, atol=1e-8)


@pytest.mark.parametrize("base", BASES)
def test_other_parameters_are_stepped_as_by_torch(base):
    torch.manual_seed(0)
    tucker = tdlrt.tuckerize(torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Linear(16, 3)), ranks=4)
    plain = copy.deepcopy(tucker)
    torchs = torch.optim.Adam if base == "adam" else torch.optim.AdamW
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


@pytest.mark.parametrize("base", BASES)
def test_a_gradient_of_zero_moves_nothing(base):
    layer, loss, _ = whole_rank()
    optimizer = tdlrt.TDLRT(layer, lr=0.05, base=base, tol=None)
    before = layer.weight.detach().clone()
    loss(0.0).backward()
    optimizer.step()
    assert torch.allclose(layer.weight.detach(), before, rtol=0, atol=1e-14)
