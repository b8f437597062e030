"""Which parameters `TDLRT` steps: some left out, some beside the model, some added later."""

import pytest
import tdlrt
import torch
from test_optimizer import backward, batch, network, run, same, snapshot
from torch import nn


def test_frozen_parameters_may_be_left_out_and_stay_as_they_are():
    model = network()
    model[6].requires_grad_(False)
    before = [p.clone() for p in model[6].parameters()]
    optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, params=[p for p in model.parameters() if p.requires_grad])
    run(model, optimizer, 2)
    model[6].requires_grad_(True)  # has gradients now, and still no group
    run(model, optimizer, 2)
    assert all(torch.equal(p, b) for p, b in zip(model[6].parameters(), before, strict=True))


def test_parameters_beside_the_model_are_stepped_clipped_and_checked():
    model, scale = network(), nn.Parameter(torch.ones((), dtype=torch.float64))
    norm = 1e-3
    optimizer = tdlrt.TDLRT(model, lr=1.0, params=[*model.parameters(), scale], max_grad_norm=norm)
    (nn.functional.cross_entropy(model(batch()[0]), batch()[1]) + 100 * scale).backward()
    optimizer.step()
    assert 1 - scale.item() == pytest.approx(norm, rel=1e-2)
    backward(model, batch())
    scale.grad.fill_(float("nan"))
    before = snapshot(model, optimizer)
    with pytest.raises(tdlrt.NonFiniteError, match=r"params\[0\]\[\d+\]"):
        optimizer.step()
    assert same(before, snapshot(model, optimizer))


def test_groups_added_later_hold_dense_parameters():
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1, max_grad_norm=1e-3)
    model[8] = nn.Linear(20, 5).double()
    before = model[8].weight.detach().clone()
    optimizer.add_param_group({"params": model[8].parameters(), "lr": 1.0})
    run(model, optimizer, 1)
    assert 0 < (model[8].weight - before).norm() <= 1e-3  # clipped with the others
    model[8] = tdlrt.TuckerLinear(20, 5, ranks=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="param_group has Tucker parameters of 8; make a new TDLRT"):
        optimizer.add_param_group({"params": model[8].parameters()})
    assert len(optimizer.param_groups) == 2
