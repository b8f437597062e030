"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import tdlrt
import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.Flatten(), nn.Linear(12 * 16, 10))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    given = {"model": model, "loader": [(x, y)] * 3, "criterion": nn.CrossEntropyLoss()}
    before = criterion_of(given)
    assert BLOCKS
    for block in BLOCKS:
        exec(block, given)
    assert not any(isinstance(m, tdlrt.TuckerConv2d) for m in given["plain"].modules())
    assert torch.allclose(given["plain"](x), given["model"](x), atol=1e-5)
    assert criterion_of(given) < before


def criterion_of(given):
    x, y = given["loader"][0]
    return float(given["criterion"](given["model"](x), y).detach())


def test_every_public_name_it_mentions_exists():
    names = set(re.findall(r"\btdlrt\.([A-Za-z_]+)\(", README))
    assert names
    assert not [name for name in names if not hasattr(tdlrt, name)]
