"""The rings: dependence runs tdlrt → tucker_kernels → csrc, and nothing points back."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tucker_kernels as tk

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "tucker_kernels").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
ALLOWED = {  # inside tucker_kernels: which module may import which others; everything may import the table of back ends
    "native": set(),
    "dispatch": {"native"},
    "validation": set(),
    "cost_model": {"native", "reference"},
    "reference": {"dispatch"},
    "tables": {"native", "reference"},
    "cpu": {"dispatch", "native", "tables"},
    "cpu_conv": {"dispatch", "cost_model", "cpu", "native", "reference", "tables"},
    "cpu_linear": {"dispatch", "native", "tables"},
    "cuda": {"dispatch", "native", "reference", "tables"},
    "library": {"dispatch", "reference"},
    "functions": {"library", "reference"},
    "functional": {"functions", "library", "reference", "validation"},
    "convolution": {"dispatch", "cost_model", "functional", "functions", "library", "reference", "validation"},
    "linear": {"convolution", "cost_model", "functional", "functions", "library", "validation"},
}


def name(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Full names of the modules a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def test_the_files_are_found():
    assert len(PYTHON) > 8
    assert len(NATIVE) > 8


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_the_kernels_do_not_know_the_training_step(path):
    assert not [m for m in imported(path) if m.split(".")[0] == "tdlrt"]


@pytest.mark.parametrize("stem", ALLOWED)
def test_inner_modules_do_not_import_outer_ones(stem):
    modules = {m.split(".")[1] for m in imported(ROOT / f"tucker_kernels/{stem}.py") if m.startswith("tucker_kernels.")}
    assert modules - {"_C"} <= ALLOWED[stem]


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_native_code_is_free_of_torch_and_python(path):
    """Only the binding may include pybind11, and nothing may include torch."""
    for header in includes(path):
        assert not header.startswith(("torch/", "ATen/", "c10/"))
        if not path.name.startswith("module"):
            assert not header.startswith(("pybind11", "Python.h"))


@pytest.mark.parametrize("path", [p for p in NATIVE if "simd" in p.parts], ids=name)
def test_code_compiled_per_instruction_set_instantiates_no_standard_templates(path):
    """A weak symbol compiled with AVX-512 could be the copy the linker keeps, and crash machines without it."""
    allowed = {"cstdint", "cstddef", "stdint.h", "immintrin.h", "arm_neon.h", "type_traits", "utility"}
    assert not [h for h in includes(path) if "/" not in h and not h.endswith(".h") and h not in allowed]


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_the_public_header_is_c(path):
    if path.parent.name == "include":
        assert not re.search(r"^\s*#\s*include\s*<(?!stdint\.h|stddef\.h)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("public", tk.__all__)
def test_public_names_are_documented(public):
    text = inspect.getdoc(getattr(tk, public))
    assert text
    assert len(text) > 60


def test_public_names_are_all_there_is():
    shown = {n for n, v in vars(tk).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert shown == set(tk.__all__) - {"functions"}


def test_import_is_light():
    """Importing the kernels starts no compiler and imports neither Triton nor the training step."""
    code = (
        "import sys, torch; before = set(sys.modules); import tucker_kernels\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before if m.split('.')[0] in "
        "('triton', 'tdlrt', 'scipy', 'matplotlib', 'sklearn', 'rich', 'pybind11', 'torch._inductor')})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_rules_notice_what_they_forbid(tmp_path):
    outward = tmp_path / "outward.py"
    outward.write_text("def f():\n    from tdlrt.layers import TuckerLinear\n")
    assert "tdlrt.layers" in imported(outward)
    kernel = tmp_path / "kernel.cuh"
    kernel.write_text("#pragma once\n#include <torch/extension.h>\n")
    assert includes(kernel) == ["torch/extension.h"]
