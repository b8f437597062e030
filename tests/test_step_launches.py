"""How many kernels a training step launches on CUDA: the calls of `TDLRT.step`, recorded on the emulated back end.

The numbers do not depend on the depth, with which tables grow; tests/test_launch_plans.py has the sizes of a ResNet18.
"""

import sys
from pathlib import Path

import pytest
import tdlrt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_device

GROW = [("tangent_basis", 8)]
AGREE = [("multi_mode_dot", 1), ("cross_gram", 1)]  # kept pairs and gradients, see integrators/agreement.py
MOMENTUM_IN = [("cross_gram", 1), ("gram_solve", 4), ("multi_mode_dot", 1)]
TRUNCATE = [("hosvd_truncate", 10), ("rotate_bases", 3)]
POLAR = [("cross_gram", 1), *[("multi_mode_dot", 1)] * 14]  # of Muon, see muon.py
MOMENTUM_OUT = [("multi_mode_dot", 2), ("cross_gram", 1), ("multi_mode_dot", 1)]  # with the core's, one launch a mode


def calls_of_a_step(depth, **options):
    """[(operator, kernels)] of the second step of a network of that many inner convolutions."""
    torch.manual_seed(0)
    inner = [nn.Conv2d(12, 12, 3, padding=1) for _ in range(depth)]
    net = nn.Sequential(nn.Conv2d(6, 12, 3), *inner, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = tdlrt.tuckerize(net, ranks=0.5, min_features=0)
    optimizer = tdlrt.TDLRT(net, lr=0.01, tol=0.05, **options)
    x, labels = torch.randn(4, 6, 6, 6), torch.arange(4)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        calls = gpu_device.plans(optimizer.step, gpu_device.Stand)
    return [(name, len(plan["launches"])) for name, _, plan in calls]


@pytest.mark.parametrize("depth", [1, 3])
def test_calls_of_a_whole_step(depth, monkeypatch):
    from emu import device as emulated

    emulated.install(monkeypatch)
    assert calls_of_a_step(depth) == GROW + AGREE + TRUNCATE
    assert calls_of_a_step(depth, momentum=0.9) == GROW + AGREE + MOMENTUM_IN + TRUNCATE + MOMENTUM_OUT
    assert calls_of_a_step(depth, base="muon") == GROW + AGREE + MOMENTUM_IN + POLAR + TRUNCATE + MOMENTUM_OUT
