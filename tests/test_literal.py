"""The rival of bench/training_step.py computes what TDLRT computes; a rival that is wrong proves nothing."""

import copy
import sys
from pathlib import Path

import tdlrt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import literal


def test_literal_steps_equal_tdlrt_steps():
    torch.manual_seed(0)
    dense = nn.Sequential(
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).double()
    rival = literal.literal(copy.deepcopy(dense), 0.5).eval()  # its two passes would count statistics twice
    model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=0.5, min_features=8, skip=("6",)).eval()
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=None)

    def full(layer):
        return literal.mode_product(literal.mode_product(layer.core, layer.U, 0), layer.V, 1)

    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 8, 7, 7, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 5, (6,), generator=generator)

        def loss_of(net):
            return nn.functional.cross_entropy(net(x), y)

        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        literal.step(rival, loss_of, 0.1)
        for index in (0, 3):
            assert torch.allclose(model[index].weight, full(rival[index]), rtol=0, atol=1e-9)
        assert torch.allclose(model[6].weight, rival[6].weight, rtol=0, atol=1e-9)
