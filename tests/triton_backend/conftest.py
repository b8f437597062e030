"""These tests run in processes of their own, which `tests/test_triton.py` starts: one process cannot both interpret and
compile, and the choice is made before triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("TK_TRITON")  # "interpret", "compile", or nothing: an ordinary run, which collects none of these
collect_ignore_glob = [] if MODE else ["test_*.py"]
if MODE == "interpret":
    collect_ignore_glob = ["test_compiled.py"]
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter  # noqa: F401 - before the kernels are imported
elif MODE == "compile":
    collect_ignore_glob = ["test_interpreted_*.py"]

if MODE:
    sys.path.insert(0, str(Path(__file__).parent.parent))

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
