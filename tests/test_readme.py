"""What the README and the guide show runs as it stands there, and the files that documents name exist."""

import re
from pathlib import Path

import pytest
import tdlrt
import torch
from torch import nn

import tucker_kernels as tk

ROOT = Path(__file__).parents[1]
README, GUIDE = (ROOT / "README.md").read_text(), (ROOT / "docs" / "guide.md").read_text()


def blocks_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    given = {"model": model, "loader": [(x, y)] * 3, "criterion": nn.CrossEntropyLoss()}
    before = criterion_of(given)
    assert blocks_of(README)
    for block in blocks_of(README):
        exec(block, given)
    assert not any(isinstance(m, tdlrt.TuckerConv2d) for m in given["plain"].modules())
    assert torch.allclose(given["plain"](x), given["model"](x), atol=1e-5)
    assert criterion_of(given) < before


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_the_recipes_of_the_guide_run_in_order():
    torch.manual_seed(0)
    loader = [(torch.randn(8, 16, 8, 8), torch.arange(8)) for _ in range(4)]
    given = {"model": Network(), "loader": loader, "criterion": nn.CrossEntropyLoss()}
    assert len(blocks_of(GUIDE)) > 6
    for block in blocks_of(GUIDE):
        exec(block, given)
        if "stored = " in block:  # what was loaded computes what was stored
            own = given["stored"]["model"]
            assert all(torch.equal(value, own[key]) for key, value in given["model"].state_dict().items())
    assert type(given["model"].head) is nn.Linear
    x, model = loader[0][0], given["model"].eval()
    for program in (given["plain"], given["program"].module()):
        assert torch.allclose(program(x), model(x), atol=1e-5)
    conv, own = given["conv"], given["factorised"]
    weight = torch.einsum("abij,oa,cb,hi,wj->ochw", own.core, *own.factors)
    x = torch.randn(2, 16, 9, 9)
    assert torch.allclose(own(x), nn.functional.conv2d(x, weight, conv.bias, padding=1), atol=1e-5)


def criterion_of(given):
    x, y = given["loader"][0]
    return float(given["criterion"](given["model"](x), y).detach())


def test_every_public_name_they_mention_exists():
    names = set(re.findall(r"\btdlrt\.([A-Za-z_]+)\(", README + GUIDE))
    assert names
    assert not [name for name in names if not hasattr(tdlrt, name)]


def test_the_readme_mentions_everything_public():
    names = {*tdlrt.__all__, *tk.__all__} - {"Compression"}  # what compression() returns
    assert not [name for name in names if f"`{name}" not in README]


def named_files(document):
    """Paths in backticks: to a folder (ending in a slash) or to a file with an extension that the tree has."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([\w./-]+(?:\.(?:py|cpp|cuh|cu|h|md|txt|toml|json)|/))`", text))


@pytest.mark.parametrize("name", ["docs/map.md", "csrc/README.md", "csrc/emu/README.md", "CONTRIBUTING.md"])
def test_every_file_a_document_names_exists(name):
    document = ROOT / name
    bases = (ROOT, document.parent, ROOT / "tucker_kernels", ROOT / "python/tdlrt", ROOT / "csrc")
    names = named_files(document)
    assert len(names) > 4
    placeholders = {n for n in names if "NAME" in n}
    missing = [n for n in names - placeholders if not any((base / n).exists() for base in bases)]
    assert not missing


def test_every_operator_the_map_names_exists():
    rows = [line.split("|") for line in (ROOT / "docs/map.md").read_text().splitlines() if line.count("|") > 5]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[-4])}
    assert len(names) > 6
    assert not [name for name in names if not hasattr(torch.ops.tucker_kernels, name)]
