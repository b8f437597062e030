"""`make gpu-check`, rehearsed on the CPU: a failing stage is reported, the rest goes on, and the exit status tells."""

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("gpu_check", Path(__file__).parents[1] / "bench/gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_check)


def test_rehearsal_writes_its_results(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert set(result["steps"]) == {"n/8", "n/4", "n/2"}
    assert all(value > 0 for step in result["steps"].values() for value in step["seconds"].values())
    assert "rehearsal" in result["card"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 stages passed, 0 failed")


def test_a_failing_stage_is_reported_and_the_rest_goes_on(monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("planted")

    ran = []
    monkeypatch.setattr(gpu_check, "STAGES", {"tests": fail, "sanitizer": lambda _: ran.append(1)})
    assert gpu_check.main(["--stages", "tests", "sanitizer"]) == 1
    assert ran == [1]
    assert "FAILED: RuntimeError: planted" in capsys.readouterr().out


def test_the_budget_ends_it(monkeypatch):
    monkeypatch.setattr(gpu_check, "BUDGET", -1)
    monkeypatch.setattr(gpu_check, "STAGES", {"build": lambda _: pytest.fail("ran after the budget")})
    assert gpu_check.main(["--stages", "build"]) == 1
