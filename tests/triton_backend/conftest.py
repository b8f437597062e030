"""These tests run in processes of their own, which `tests/test_triton.py` starts: one process cannot both interpret and
compile, and the choice is made before triton is imported.

TK_TRITON is "interpret", "compile", "cuda" (the kernels' tests on a device), or unset: an ordinary run collects none.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("TK_TRITON")
TESTS = {
    "interpret": ("test_kernels.py", "test_interpreted_operators.py"),
    "compile": ("test_compiled.py",),
    "cuda": ("test_kernels.py",),
    None: (),
}
HERE = Path(__file__).parent
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name not in TESTS[MODE]]
if MODE == "interpret":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.path.insert(0, str(HERE))
    import interpreter  # noqa: F401 - before the kernels are imported
elif MODE == "cuda":
    torch.set_default_device("cuda")

if MODE:
    sys.path.insert(0, str(HERE.parent))

    @pytest.fixture(autouse=True, scope="session")
    def _poisoned_memory():
        """What torch.empty returns is NaN, so that an element nobody writes shows."""
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True


if MODE == "interpret":

    @pytest.fixture(autouse=True)
    def _few_programs(monkeypatch):
        """Programs run one after the other here: split sums into a few, not into hundreds."""
        monkeypatch.setattr("tucker_kernels.triton.configs.PROGRAMS", 6)
