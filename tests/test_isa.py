"""The CPU kernels of every instruction set: the tests of the operators again, with a lower one chosen by TK_ISA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tucker_kernels.native import native_module

HERE = Path(__file__).parent
ISAS = ["baseline", "avx2", "avx512"]  # lowest first
KERNELS = "not reference and (shape or edge or path or inner or belong)"  # no derivatives, errors, threads
TESTS = ["test_mode_dot.py", "test_multi_mode_dot.py", "test_cross_gram.py", "test_tucker_linear.py"]


def run(isa, *command):
    environment = {**os.environ, "TK_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=600
    )


def isa_used(isa):
    """What the compiled module says in a process of its own; loaded from its file, which spares importing torch."""
    path = native_module()[0].__file__
    load = f"spec_from_file_location('_C', {path!r}); m = u.module_from_spec(s); s.loader.exec_module(m)"
    done = run(isa, "-c", f"import importlib.util as u; s = u.{load}; print(m.cpu_isa())")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_best_instruction_set_is_chosen():
    capability = torch.backends.cpu.get_cpu_capability()  # what torch found, by its own means
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability.split("_")[0], "baseline")
    assert isa_used("") == expected


def test_tk_isa_lowers_and_never_raises():
    best = ISAS.index(isa_used(""))
    assert [isa_used(isa) for isa in ISAS] == [ISAS[min(i, best)] for i in range(len(ISAS))]
    assert isa_used("nonsense") == ISAS[best]


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(native_module()[0].cpu_isa())])
def test_operators_below_the_best(isa):
    files = [str(HERE / name) for name in TESTS]
    done = run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", KERNELS, *files)
    assert done.returncode == 0, f"TK_ISA={isa}\n{done.stdout[-4000:]}"
