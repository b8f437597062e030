"""Which back end an operator goes to: order, preference, refusal with the reason, and what threads see."""

import logging
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from emu import device as emulated

import tucker_kernels as tk
from tucker_kernels import dispatch
from tucker_kernels.dispatch import DEVICES, NAMES, ORDER, _log_refusal, chosen, implementation, implements
from tucker_kernels.native import CALLED, MAX_MODES, native_module

X, M = torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_preference():
    tk.use_backend(None)
    yield
    tk.use_backend(None)


@pytest.fixture
def recorded(monkeypatch):
    """Names of the back ends that run mode_dot, in order."""
    ran = []
    table = implements.__globals__["_implementations"]
    for name in ("reference", "cpu"):
        original = table[name]["mode_dot"]
        monkeypatch.setitem(
            table[name], "mode_dot", lambda *args, name=name, original=original: ran.append(name) or original(*args)
        )
    return ran


def test_names_and_reasons():
    found = tk.backends()
    assert tuple(found) == NAMES
    assert all(isinstance(available, bool) and reason for available, reason in found.values())
    assert found["reference"][0]
    assert found["cpu"][0]


def test_the_native_back_end_comes_before_the_reference():
    assert ORDER["cpu"] == ("cpu", "reference")
    assert ORDER["cuda"] == ("cuda", "triton", "reference")
    assert chosen("mode_dot", "cpu") == "cpu"


def test_use_as_a_function(recorded):
    tk.mode_dot(X, M, 1)
    tk.use_backend("reference")
    tk.mode_dot(X, M, 1)
    tk.use_backend(None)
    tk.mode_dot(X, M, 1)
    assert recorded == ["cpu", "reference", "cpu"]


def test_use_as_a_context(recorded):
    with tk.use_backend("reference"):
        tk.mode_dot(X, M, 1)
        with tk.use_backend("cpu"):
            tk.mode_dot(X, M, 1)
        tk.mode_dot(X, M, 1)
    tk.mode_dot(X, M, 1)
    assert recorded == ["reference", "cpu", "reference", "cpu"]


def test_the_preference_ends_with_the_block_also_when_it_fails():
    with pytest.raises(KeyError), tk.use_backend("reference"):
        raise KeyError
    assert chosen("mode_dot", "cpu") == "cpu"


def test_a_refusal_leaves_the_preference_as_it_was():
    tk.use_backend("reference")
    with pytest.raises(ValueError, match="name must be one of reference, cpu, cuda, triton or None, got 'tpu'"):
        tk.use_backend("tpu")
    for name in ("cuda", "triton"):
        available, reason = tk.backends()[name]
        if not available:
            with pytest.raises(ValueError, match=f"back end '{name}' cannot run here") as raised:
                tk.use_backend(name)
            assert reason in str(raised.value)
    assert chosen("mode_dot", "cpu") == "reference"


def test_other_threads_see_the_preference(recorded):
    """Backward passes run on threads of their own; a preference per thread would not reach them."""
    with tk.use_backend("reference"):
        thread = threading.Thread(target=lambda: tk.mode_dot(X, M, 1))
        thread.start()
        thread.join()
        x = X.clone().requires_grad_()
        tk.mode_dot(x, M, 1).sum().backward()
    assert recorded == ["reference"] * 3


def test_a_preference_for_another_device_changes_nothing():
    """A CUDA back end is never asked to work on host tensors."""
    assert "cpu" not in DEVICES["cuda"]
    assert "cpu" not in DEVICES["triton"]
    assert "cuda" not in DEVICES["cpu"]


def test_operators_that_a_back_end_lacks_go_on_in_order(monkeypatch):
    table = implements.__globals__["_implementations"]
    monkeypatch.delitem(table["cpu"], "mode_dot")
    assert chosen("mode_dot", "cpu") == "reference"
    monkeypatch.delitem(table["reference"], "mode_dot")
    with pytest.raises(RuntimeError, match="no back end implements mode_dot on cpu"):
        implementation("mode_dot", "cpu")


def test_unsupported_devices_are_named():
    with pytest.raises(ValueError, match="device: tensors on 'xpu' are not supported; allowed are cpu and cuda"):
        chosen("mode_dot", "xpu")


def test_a_back_end_that_cannot_run_is_passed_over_with_a_warning(monkeypatch, caplog):
    usable = chosen.__globals__["_usable"]
    usable.cache_clear()
    monkeypatch.setitem(chosen.__globals__, "backends", lambda: {"cpu": (False, "it rains"), "reference": (True, "")})
    with caplog.at_level(logging.WARNING, "tucker_kernels"):
        assert chosen("mode_dot", "cpu") == "reference"
        assert chosen("mode_dot", "cpu") == "reference"
    assert [record.getMessage() for record in caplog.records] == ["back end cpu is not used: it rains"]
    usable.cache_clear()


def test_every_operator_has_a_reference():
    operators = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("tucker_kernels::")}
    assert operators == set(implements.__globals__["_implementations"]["reference"])


def card(monkeypatch, problem):
    """A machine with a card, and a compiled module that finds `problem` with it."""
    module = types.SimpleNamespace(cuda_architectures=lambda: "80 90a", cuda_unusable=lambda: problem)
    monkeypatch.setattr(dispatch, "native_module", lambda: (module, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))


def test_a_card_that_the_kernels_were_not_compiled_for_is_told_before_the_first_launch(monkeypatch):
    words = "loading the kernels: no kernel image is available for execution on the device"
    card(monkeypatch, words)
    expected = f"compiled kernels for 80 90a on Tesla T4 (compute capability 7.5): {words}"
    assert dispatch._cuda_status() == (False, expected)


def test_a_card_that_can_run_the_kernels_is_named(monkeypatch):
    card(monkeypatch, "")
    assert dispatch._cuda_status() == (True, "compiled kernels for 80 90a on Tesla T4")


OLD_MODULE = """
import sys, types
sys.modules["tucker_kernels._C"] = types.ModuleType("tucker_kernels._C")
import tdlrt, torch
import tucker_kernels as tk
available, reason = tk.backends()["cpu"]
assert not available and "older than the package (it has no cpu_isa)" in reason and "make dev" in reason, reason
x = torch.randn(3, 4)
assert torch.allclose(tk.mode_dot(x, x, 1), x @ x.T)
layer = tdlrt.tuckerize(torch.nn.Conv2d(8, 8, 3), ranks=0.5, min_features=0)
layer(torch.randn(2, 8, 6, 6)).sum().backward()
"""


def test_an_older_compiled_module_is_said_and_the_reference_used():
    subprocess.run([sys.executable, "-c", OLD_MODULE], check=True)


def test_what_is_called_in_the_compiled_module_is_checked():
    package = Path(tk.__file__).parent
    called = {
        name
        for file in package.glob("*.py")
        if file.name != "cuda.py"  # a build without CUDA has none of it; see CALLED_WITH_CUDA
        for name in re.findall(r"\b_C\.(\w+)", file.read_text().replace("torch._C.", ""))
    }
    called |= {f"{name}_cpu" for name in re.findall(r'\brun\("(\w+)"', (package / "tables.py").read_text())}
    assert called | {"cpu_isa", "openmp"} == set(CALLED)
    assert native_module()[0].max_modes == MAX_MODES


@pytest.mark.parametrize("back_end", ["cpu", "cuda"])
def test_a_core_of_too_many_modes_goes_elsewhere_and_that_is_said(back_end, monkeypatch, caplog):
    if back_end == "cuda":
        emulated.install(monkeypatch)
    _log_refusal.cache_clear()
    core = torch.randn((2,) * (MAX_MODES + 1), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO, "tucker_kernels"):
        (new,), (projections,), _, error = tk.hosvd_truncate([core], tol=0.5)
    text = f"hosvd_truncate does not go to back end {back_end}: 9 modes, and the kernel takes 8"
    assert text in [record.getMessage() for record in caplog.records]
    back = tk.multi_mode_dot(new, projections)
    assert float(error) == pytest.approx(float((core - back).norm() / core.norm()), rel=1e-9)
    assert 0 < float(error) <= 0.5
