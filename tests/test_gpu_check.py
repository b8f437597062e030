"""`make gpu-check` without a GPU: a dry run of every stage, deadlines, failures, and what only a card would run."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_the_card_times_captures_and_profiles(monkeypatch):
    for name in ("Stream", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, Context)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Context)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
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

    names = quiet(monkeypatch, step=(slow, 5))
    start = time.monotonic()
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", *names]) == 1
    assert time.monotonic() - start < 20
    shown = capsys.readouterr().out
    assert "FAILED: not done after 5 s" in shown
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


def test_the_budget_is_below_eight_minutes():
    assert gpu_check.BUDGET <= 8 * 60 - 15
    assert list(gpu_check.STAGES)[:4] == ["build", "tests", "triton_tests", "sanitizer"]


@pytest.mark.long
def test_a_dry_run_of_everything(tmp_path, capfd):
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path), "--commit", "abc"]) == 0
    shown = capfd.readouterr().out
    assert "8 stages ended well, 0 failed" in shown
    assert "commit abc" in shown
    assert shown.index("linear algebra of a ResNet18 step") < shown.index("kernels at n/4")
