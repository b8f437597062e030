"""`make gpu-check` without a GPU: a dry run of every stage, deadlines, failures, and what only a card would run."""

import contextlib
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emu import device as emulated
from torch import nn

import tucker_kernels

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import gpu_check  # noqa: E402
import gpu_device  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_model  # noqa: E402
import gpu_step  # noqa: E402


def rows_of(path, kind):
    return [r for r in gpu_check.read_rows(path) if r["kind"] == kind]


# ---- the two measuring scripts, on the executor of csrc/emu ------------------------------------------------


def test_a_step_is_measured_and_its_replay_compared(tmp_path):
    rows = tmp_path / "rows"
    gpu_step.main(["--dry-run", "--budget", "60", "--rows", str(rows)])
    names = [r["name"] for r in rows_of(rows, "step")]
    assert "ours: whole step, CUDA graph" in names
    assert names[-1] == "torch.linalg, literal loop"
    assert all(r["seconds"] > 0 for r in rows_of(rows, "step"))
    assert ["bit for bit" in r["text"] for r in rows_of(rows, "note")] == [True]
    assert not rows_of(rows, "wrong")


def test_whole_steps_are_captured_compared_and_captured_again_at_other_capacities(tmp_path):
    rows = tmp_path / "rows"
    gpu_model.main(["--dry-run", "--budget", "60", "--rows", str(rows)])
    assert not rows_of(rows, "wrong")
    notes = [r["text"] for r in rows_of(rows, "note")]
    assert len(notes) == 2
    assert all("0.0e+00 apart with the same ranks" in text for text in notes)  # the same calls here
    assert [r["how"] for r in rows_of(rows, "model")] == ["eager", "CUDA graph"] * 2
    lines = gpu_check.table(gpu_check.read_rows(rows))
    assert any(line.startswith("tiny, at capacity ") for line in lines)


@pytest.mark.parametrize("mistake", ["a step too few", "no capture"])
def test_a_captured_training_step_that_goes_wrong_is_told(mistake, tmp_path, monkeypatch):
    class Forgetful(gpu_device.Stand):
        @staticmethod
        def captured(call):
            if mistake == "no capture":
                raise RuntimeError("planted")
            return lambda: None, call()

    monkeypatch.setattr(gpu_device, "Stand", Forgetful)
    rows = tmp_path / "rows"
    gpu_model.main(["--dry-run", "--rows", str(rows)])
    texts = [r["text"] for r in rows_of(rows, "wrong")]
    assert texts
    assert all(("planted" if mistake == "no capture" else "apart") in text for text in texts)


def test_every_planned_kernel_gets_a_row(tmp_path):
    rows = tmp_path / "rows"
    gpu_kernels.main(["--dry-run", "--rows", str(rows)])
    found = [r["name"] for r in rows_of(rows, "kernel") if r["operator"] == "tangent_basis"]
    assert found == ["project_out", "gram", "semidefinite_cholesky", "triangular_product"] * 2
    assert all(r["roofline"] > 0 for r in rows_of(rows, "kernel"))
    assert not rows_of(rows, "wrong")


def test_without_time_everything_is_named_and_nothing_runs(tmp_path):
    rows = tmp_path / "rows"
    gpu_step.main(["--dry-run", "--budget", "-1", "--rows", str(rows)])
    gpu_kernels.main(["--dry-run", "--budget", "-1", "--rows", str(rows)])
    assert not rows_of(rows, "step")
    assert not rows_of(rows, "kernel")
    assert sum("no time left" in r["text"] for r in rows_of(rows, "note")) == 9 + 2


def test_a_replay_that_differs_is_told(tmp_path):
    class Forgetful(gpu_device.Stand):
        @staticmethod
        def captured(call):
            return lambda: None, [t + 1 for t in call()]

    rows = gpu_device.Rows(tmp_path / "rows", 10)
    with torch.no_grad(), gpu_device.opened(True):
        gpu_step.check_capture(Forgetful(), gpu_step.layers_of(4, True), "n/4", rows)
    (wrong,) = rows_of(tmp_path / "rows", "wrong")
    assert "differs" in wrong["text"]


def test_a_kernel_that_was_not_planned_is_told(tmp_path):
    class Other(gpu_device.Stand):
        @staticmethod
        def kernels(call):
            return [("tk::gram", 1.0)]

    rows = gpu_device.Rows(tmp_path / "rows", 10)
    with torch.no_grad(), gpu_device.opened(True):
        layers = gpu_step.layers_of(4, True)
        gpu_kernels.measure(Other(), "tangent_basis", lambda: gpu_step.augment(layers), (1, 1, 1), rows)
    (wrong,) = rows_of(tmp_path / "rows", "wrong")
    assert "the profiler saw" in wrong["text"]


# ---- the card: torch.cuda played by the host --------------------------------------------------------------


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at) + 1e-6


class Context:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def replay(self):
        pass


def play_card(monkeypatch):
    for name in ("Stream", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_the_card_times_captures_and_profiles(monkeypatch):
    play_card(monkeypatch)
    calls = []
    assert gpu_device.Card().seconds(lambda: calls.append(1)) > 0
    assert len(calls) == 1 + gpu_device.Card.repeats
    calls.clear()
    assert gpu_device.Card().seconds(lambda: (calls.append(1), time.sleep(0.01)), slow=0.005) > 0.005
    assert len(calls) == 1, "a slow call is made once"
    replay, results = gpu_device.Card.captured(lambda: [torch.ones(2)])
    replay()
    assert torch.equal(results[0], torch.ones(2))
    assert gpu_device.Card.kernels(lambda: torch.ones(3) + 1) == []  # a real profiler, and no card
    assert gpu_device.Card.plan_arguments() == (132, 232448)


@pytest.fixture
def played(monkeypatch):
    """Every script as on a card, small: torch.cuda is played by the host, kernels run in csrc/emu."""
    play_card(monkeypatch)
    emulated.install(monkeypatch)
    host = types.ModuleType("torch")
    host.__dict__.update(torch.__dict__, device=lambda name: torch.device({"cuda": "cpu"}.get(name, name)))
    monkeypatch.setattr(gpu_device, "torch", host)
    monkeypatch.setattr(gpu_device.Card, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu_device.Card, "repeats", 2)
    monkeypatch.setattr(tucker_kernels, "backends", lambda: {"cuda": (True, "")})
    capture = gpu_device.Card.captured

    def captured(call):
        _, results = capture(call)
        return lambda: [old.copy_(new) for old, new in zip(results or [], call() or [])], results

    monkeypatch.setattr(gpu_device.Card, "captured", staticmethod(captured))
    layers, ceilings = gpu_step.layers_of, gpu_kernels.ceilings
    monkeypatch.setattr(gpu_step, "layers_of", lambda divisor, dry_run: layers(divisor, True))
    monkeypatch.setattr(gpu_kernels, "ceilings", lambda card, tiny: ceilings(card, True))
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(gpu_model, "networks", lambda dry_run: {"small": (network, (4, 3, 6, 6))})
    monkeypatch.setattr(gpu_model, "STEPS", 2)
    monkeypatch.setattr(gpu_model, "AFTER", 1)


@pytest.mark.parametrize("script", [gpu_step, gpu_model, gpu_kernels], ids=lambda module: module.__name__)
def test_the_scripts_as_on_a_card(script, played, tmp_path):
    rows = tmp_path / "rows"
    script.main(["--budget", "60", "--rows", str(rows)])
    assert not rows_of(rows, "wrong")
    found = {kind: [r.get("name", r.get("text")) for r in rows_of(rows, kind)] for kind in ("step", "model", "note")}
    if script is gpu_step:
        assert len(found["step"]) == 9 * len(gpu_step.DIVISORS)
    if script is gpu_model:
        assert len(found["model"]) == 4
    if script is gpu_kernels:  # a real profiler, and no card
        assert sum("the profiler saw no kernel" in text for text in found["note"]) == 2


def test_a_card_without_its_back_end_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("asks what happens without a GPU")
    with pytest.raises(RuntimeError, match="cuda back end cannot run"), gpu_device.opened(False):
        pass


# ---- the stages -------------------------------------------------------------------------------------------


def quiet(monkeypatch, **stages):
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    return [*stages]


def test_a_failing_stage_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("planted")

    ran = []
    names = quiet(monkeypatch, build=(fail, 10), tests=(lambda *_: ran.append(1), 10))
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names]) == 1
    assert ran == [1]
    assert "FAILED: RuntimeError: planted" in capsys.readouterr().out


def test_a_stage_ends_at_its_deadline_and_keeps_its_rows(monkeypatch, tmp_path, capsys):
    def slow(arguments, deadline):
        program = (
            f"import sys, time, subprocess; sys.path.insert(0, {str(BENCH)!r}); import gpu_device\n"
            f"gpu_device.Rows({str(arguments.rows)!r}, 9).add('step', name='a row', ranks='n/4', seconds=1e-3)\n"
            f"open({str(arguments.rows)!r}, 'a').write('{{\"kind\": \"st')\n"
            "subprocess.run(['sleep', '60'])\n"
        )
        gpu_check.run([sys.executable, "-c", program], deadline)

    names = quiet(monkeypatch, step=(slow, 6))
    start = time.monotonic()
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names]) == 1
    assert time.monotonic() - start < 20
    shown = capsys.readouterr().out
    assert re.search("FAILED: not done after [56] s", shown)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == ["a row"]
    assert "rehearsal" in result["card"]
    assert f"{'a row':46}     1.000" in shown


def test_a_wrong_result_fails_it(monkeypatch, tmp_path, capsys):
    def differs(arguments, deadline):
        gpu_device.Rows(arguments.rows, 9).add("wrong", text="a replayed step differs from the eager one")

    names = quiet(monkeypatch, step=(differs, 10))
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names]) == 1
    assert "results found wrong: 1" in capsys.readouterr().out


def test_the_budget_ends_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "BUDGET", 0)
    names = quiet(monkeypatch, build=(lambda *_: pytest.fail("ran after the budget"), 10))
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names]) == 0
    assert "[build] not run: out of time" in capsys.readouterr().out


def test_shares_fill_the_budget_which_is_below_eight_minutes():
    assert sum(share for _, share in gpu_check.STAGES.values()) == gpu_check.BUDGET <= 8 * 60 - 15
    assert list(gpu_check.STAGES)[:3] == ["build", "tests", "step"]


def test_what_a_stage_leaves_of_its_share_goes_to_those_after_it(monkeypatch, tmp_path):
    given = {}

    def quick(name):
        return lambda _, deadline: given.update({name: deadline - time.monotonic()})

    names = quiet(monkeypatch, first=(quick("first"), 30), second=(quick("second"), 40), third=(quick("third"), 400))
    monkeypatch.setattr(gpu_check, "BUDGET", 100)
    gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names])
    assert given == pytest.approx({"first": 30, "second": 70, "third": 100}, abs=1)


KILLED = """
import os, signal, sys
sys.path.insert(0, {bench!r})
import gpu_check, gpu_device
def row(arguments, deadline):
    gpu_device.Rows(arguments.rows, 9).add("step", name="a row", ranks="n/4", seconds=1e-3)
    return "measured"
def die(arguments, deadline):
    row(arguments, deadline)
    os.kill(os.getpid(), signal.{signal})
gpu_check.STAGES = {{"step": (row, 9), "model": (die, 9)}}
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
gpu_check.main(["--dry-run", "--out", {out!r}, "--stages", "step", "model"])
"""


@pytest.mark.parametrize(("signal", "rows"), [("SIGTERM", 2), ("SIGKILL", 1)])
def test_what_ends_it_before_its_time_loses_no_stage_that_was_done(signal, rows, tmp_path):
    program = KILLED.format(bench=str(BENCH), out=str(tmp_path), signal=signal)
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode != 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["rows"]) == rows
    assert result["stages"]["step"].startswith("measured (")
    assert result["stages"]["model"] == "begun, and cut off"


# ---- what only a machine with CUDA has --------------------------------------------------------------------


def tool(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("where", ["beside nvcc", "CUDA_HOME", "its own folder"])
def test_the_sanitizer_is_looked_for_where_toolkits_have_it(where, monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    tool(tmp_path / "cuda/bin", "nvcc")
    tool(tmp_path / "cuda" / ("compute-sanitizer" if where == "its own folder" else "bin"), "compute-sanitizer")
    tool(tmp_path / "path", "sh")
    if where == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    else:
        (tmp_path / "path/nvcc").symlink_to(tmp_path / "cuda/bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    ran = []
    monkeypatch.setattr(gpu_check, "run", lambda command, deadline: ran.append(command))
    assert gpu_check.sanitizer(SimpleNamespace(dry_run=False), 0) == "memcheck and racecheck are clean"
    assert [command[2].startswith(str(tmp_path / "cuda")) for command in ran] == [True, True]
    assert [command[command.index("--tool") + 1] for command in ran] == ["memcheck", "racecheck"]


def test_no_time_for_the_second_check_is_not_a_failure(monkeypatch):
    def run(command, deadline):
        if failing in command:
            raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: f"/cuda/bin/{name}")
    failing = "racecheck"
    assert gpu_check.sanitizer(SimpleNamespace(dry_run=False), 0) == "memcheck is clean, no time for racecheck"
    failing = "memcheck"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.sanitizer(SimpleNamespace(dry_run=False), 0)


def test_without_a_sanitizer_the_report_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "toolkits", lambda: [str(tmp_path / "bin")])
    report = gpu_check.sanitizer(SimpleNamespace(dry_run=False), 0)
    assert report == f"not run: no compute-sanitizer in {tmp_path}:{tmp_path / 'bin'}"


def test_build_commands_are_for_the_card_that_is_there(monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_check, "run", lambda command, deadline: ran.append([str(part) for part in command]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_check.build(SimpleNamespace(dry_run=False), 0) == "for 90a-real"
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in ran[0]
    assert [command[1] for command in ran] == ["-S", "--build", "--install"]


def test_stages_run_what_is_there_until_their_deadline(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(gpu_check, "run", lambda command, deadline: ran.append([str(part) for part in command]))
    arguments = SimpleNamespace(dry_run=False, rows=tmp_path / "rows")
    for name in ("tests", "triton_tests", "step", "model", "kernels"):
        gpu_check.STAGES[name][0](arguments, time.monotonic() + 60)
    for command in ran[:2]:
        assert command[command.index("gpu") - 1] == "-m"
        assert "--collect-only" not in command
        assert (gpu_check.ROOT / command[-1]).exists()
    for command in ran[2:]:
        assert Path(command[1]).exists()
        assert 50 < int(command[command.index("--budget") + 1]) < 60
        assert command[-2:] == ["--rows", str(arguments.rows)]


def test_a_command_that_fails_is_an_error():
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], time.monotonic() + 50)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_rows_of_triton_are_kept_also_when_it_is_cut(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "BENCH", tmp_path / "bench")
    written = tmp_path / "bench/results/triton_kernels.json"
    written.parent.mkdir(parents=True)

    def run(command, deadline):
        written.write_text("{}")
        if ends == "badly":
            raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(gpu_check, "run", run)
    with pytest.raises(subprocess.TimeoutExpired) if ends == "badly" else contextlib.nullcontext():
        gpu_check.triton(SimpleNamespace(dry_run=False, rows=tmp_path / "rows"), time.monotonic() + 60)
    assert (tmp_path / "triton_kernels.json").read_text() == "{}"


@pytest.mark.long
def test_a_dry_run_of_everything(tmp_path, capfd):
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--commit", "abc"]) == 0
    shown = capfd.readouterr().out
    assert "8 stages ended well, 0 failed" in shown
    assert "commit abc" in shown
    assert shown.index("linear algebra of a ResNet18 step") < shown.index("kernels at n/4")
