"""Sources compile with another compiler, for another instruction set and system, and without OpenMP."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("cpu", "cpu/simd", "cuda") for path in (ROOT / "csrc" / folder).glob("*.cpp"))
MAC = ("-target", "aarch64-macos")  # no OpenMP comes with it


def compiled(source, out):
    """What clang says to a source file; empty where it takes it without a warning."""
    command = [
        *(sys.executable, "-m", "ziglang", "c++", *MAC, "-std=gnu++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-DTK_ISA=baseline"),
        *("-c", source, "-o", out / f"{source.parent.name}_{source.stem}.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr or ("" if done.returncode == 0 else f"exit status {done.returncode}")


@pytest.mark.long
def test_clang_takes_every_source_for_a_mac_without_openmp(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        complaints = dict(zip(SOURCES, pool.map(lambda source: compiled(source, tmp_path), SOURCES)))
    assert len(complaints) > 35
    assert not {path.name: text for path, text in complaints.items() if text}


@pytest.mark.long
def test_what_only_gcc_knows_is_refused(tmp_path):
    source = tmp_path / "gcc.cpp"
    source.write_text("typedef int V __attribute__((vector_size(16)));\nV f(V a) { return __builtin_shuffle(a, a); }\n")
    assert "__builtin_shuffle" in compiled(source, tmp_path)
