"""Thousands of steps: bases stay orthonormal, nothing accumulates."""

import gc
import os
import sys
from pathlib import Path

import pytest
import tdlrt
import torch
from tdlrt.integrators import agreement
from torch import nn


def strays(model, optimizer):
    """How many tensors live that are neither parameters nor buffers, nor in the optimiser's state, nor columns by which
    pairs and gradients are compared: one matrix for each size that was met, kept in a cache of bounded size."""
    gc.collect()
    values = [v for state in optimizer.state.values() for v in state.values()]
    own = [*model.parameters(), *model.buffers(), *values, *(m for v in values if isinstance(v, list) for m in v)]
    known = {id(thing) for thing in own}
    found = sum(isinstance(thing, torch.Tensor) and id(thing) not in known for thing in gc.get_objects())
    return found - agreement._probe.cache_info().currsize


STEPS = int(os.environ.get("TDLRT_SOAK_STEPS", "1500"))


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def handles():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        {"retain": "deferred", "tol": 0.4},
        {"retain": "inline", "base": "adamw", "momentum": 0.0, "lr": 2e-3},
        {"integrator": "parallel", "budget": 1500, "basis_every": 2},
    ],
    ids=["deferred", "inline", "parallel"],
)
def test_ten_thousand_steps_stay_orthonormal(options):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    model = tdlrt.tuckerize(model, ranks=0.4, min_features=0)
    optimizer = tdlrt.TDLRT(model, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "tol": 0.05, **options})
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(3 * 64, 5, generator=generator)
    ranks, worst, before = {str(tdlrt.ranks(model))}, 0.0, None
    for step in range(STEPS):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x.flatten(1) @ teacher).argmax(1)).backward()
        optimizer.step()
        if step % 50 == 0:
            worst = max(worst, tdlrt.orthogonality_error(model))
            ranks.add(str(tdlrt.ranks(model)))
        if step == STEPS // 3:
            gc.collect()
            before = resident(), handles(), strays(model, optimizer)
    gc.collect()
    assert worst <= 1e-6
    assert len(ranks) > 1
    assert handles() <= before[1]
    assert strays(model, optimizer) <= before[2]
    assert resident() - before[0] < 16 * 2**20, "memory grows"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    print(f"{STEPS} steps, orthogonality {worst:.1e}, {(resident() - before[0]) / 2**20:+.1f} MiB")
