"""Training runs: what they write is what happened, and however they are stopped they continue bit for bit."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tdlrt
import torch
from tdlrt import checkpoint, data, train
from tdlrt.display import Quiet

# Six steps an epoch, small ranks: a run of a second or two.
QUICK = {"epochs": 2, "batch_size": 256, "rank": 12, "threads": 1}
VARIANTS = {
    "one_pass": {},
    "two_pass": {"integrator": "two_pass"},
    "all modes": {"modes": "all", "tolerance_mode": "per_mode"},
    "fixed ranks, float64": {"tol": None, "dtype": "float64"},
    "dense": {"dense": True},
}


def quick(out, **options):
    return train.Run(train.default_config("digits", **{**QUICK, **options}), data.digits(), out)


class StopAfter(Quiet):
    """Asks the run to stop after so many steps, as Ctrl-C does."""

    def __init__(self, steps):
        self.steps = steps

    def step(self, run):
        run.stop = run.steps >= self.steps


def without_times(metrics):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]


def assert_same(a, b):
    """Bitwise equality of nested containers of tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(first, second):
    """Two run folders hold the same network, optimiser, random state, ranks and metrics."""
    a, b = checkpoint.load(first), checkpoint.load(second)
    for contents in (a, b):
        contents["metrics"] = without_times(contents["metrics"])
        for name in ("seconds", "epoch_seconds"):
            del contents["progress"][name]
    assert_same(a, b)
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (first, second)]
    assert without_times(lines[0]) == without_times(lines[1]) == a["metrics"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, variant):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    quick(whole, **VARIANTS[variant]).train(Quiet())
    stop = 4
    with pytest.raises(train.InterruptionError):
        quick(parts, **VARIANTS[variant]).train(StopAfter(stop))
    for stop in (7, None):
        # A global state that differs from where the run was stopped.
        torch.manual_seed(99)
        run = train.Run.resumed(checkpoint.load(parts), data.digits(), parts)
        if stop is None:
            run.train(Quiet())
        else:
            with pytest.raises(train.InterruptionError):
                run.train(StopAfter(stop))
            assert run.steps == stop
    assert_same_run(whole, parts)


def test_seeds_differ_and_are_reproducible(tmp_path):
    networks = []
    for seed in (0, 0, 1):
        run = quick(tmp_path, seed=seed, epochs=1)
        run.train(Quiet())
        networks.append(run.model.state_dict()["fc1.core"])
    assert torch.equal(networks[0], networks[1])
    assert networks[0].shape != networks[2].shape or not torch.equal(networks[0], networks[2])


def test_what_is_written_is_what_happened(tmp_path):
    run = quick(tmp_path, tol=0.3)
    run.train(Quiet())
    assert {p.name for p in tmp_path.iterdir()} == set(train.FILES)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [6, 12]
    stored = checkpoint.load(tmp_path)
    model = checkpoint.network(stored)
    # The last line, from the stored network and the images alone.
    dataset = data.digits()
    with torch.no_grad():
        logits = model(dataset.test_images.float() / 16)
    assert lines[-1]["accuracy"] == float((logits.argmax(1) == dataset.test_labels).double().mean())
    loss = torch.nn.functional.cross_entropy(logits, dataset.test_labels)
    assert lines[-1]["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert {name: tuple(r) for name, r in lines[-1]["ranks"].items()} == tdlrt.ranks(model)
    kept = dense = 0
    for layer in (model.conv2, model.fc1):
        kept += sum(p.numel() for p in layer.parameters()) - layer.bias.numel()
        dense += math.prod(layer.weight_shape)
    assert lines[-1]["compression"] == pytest.approx(1 - kept / dense)
    # Rank history: a row per step, columns are conv2 and fc1, output and input mode; the last row is the end.
    ranks = tdlrt.ranks(model)
    assert stored["history"].shape == (12, 4)
    assert stored["history"][-1].tolist() == [*ranks["conv2"][:2], *ranks["fc1"]]
    assert stored["history"][5].tolist() == [r for n in ("conv2", "fc1") for r in lines[0]["ranks"][n][:2]]
    assert (stored["history"][0] > stored["history"][-1]).any(), "tol=0.3 cuts ranks"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] == lines[-1]["accuracy"]
    assert summary["compression"] == lines[-1]["compression"]
    assert summary["ranks"] == lines[-1]["ranks"]
    assert summary["seed"] == 0
    assert summary["seconds_per_step"] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert (tmp_path / "ranks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_dense_runs_have_no_ranks(tmp_path):
    quick(tmp_path, dense=True, epochs=1).train(Quiet())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["compression"], summary["network_compression"], summary["ranks"]) == (0.0, 0.0, {})
    assert not (tmp_path / "ranks.png").exists()


def test_more_epochs_can_be_added(tmp_path):
    quick(tmp_path, epochs=1, schedule="constant").train(Quiet())
    train.Run.resumed(checkpoint.load(tmp_path), data.digits(), tmp_path, epochs=2).train(Quiet())
    (tmp_path / "two").mkdir()
    quick(tmp_path / "two", epochs=2, schedule="constant").train(Quiet())
    first, second = checkpoint.load(tmp_path), checkpoint.load(tmp_path / "two")
    assert_same(first["model"], second["model"])


@pytest.mark.parametrize("options", [{}, {"dense": True}])
def test_a_diverged_run_says_so_and_keeps_its_last_checkpoint(tmp_path, options):
    run = quick(tmp_path, lr=1e20, schedule="constant", **options)
    with pytest.raises(train.DivergenceError, match="step"):
        run.train(Quiet(), checkpoint_every=1)
    state = checkpoint.load(tmp_path)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


# ---- kill -9 ----------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "import sys; from tdlrt.cli import main; sys.exit(main(sys.argv[1:]))", "train"]
OPTIONS = ["--epochs", "2", "--batch-size", "256", "--rank", "12", "--threads", "1", "--quiet"]


def killed_and_resumed(tmp_path, kills, seed):
    """Kills a run at random moments until `kills` were made, lets it end, and compares it with one left alone."""
    moments = random.Random(seed)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*COMMAND, *OPTIONS, "--out", whole], check=True)
    seen, made = set(), 0
    while made < kills:
        resume = ["--resume"] if (parts / "checkpoint.pt").exists() else []
        process = subprocess.Popen([*COMMAND, *OPTIONS, "--out", parts, "--checkpoint-every", "1", *resume])
        before = stamp(parts)
        while process.poll() is None and stamp(parts) == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        made += 1
        seen.add(checkpoint.load(parts)["progress"]["batch"])
    assert subprocess.run([*COMMAND, *OPTIONS, "--out", parts, "--resume"]).returncode == 0
    assert not [p for p in parts.iterdir() if p.name not in train.FILES]
    assert_same_run(whole, parts)
    return made


def stamp(folder):
    try:
        return os.stat(folder / "checkpoint.pt").st_mtime_ns
    except FileNotFoundError:
        return None


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    assert killed_and_resumed(tmp_path, kills=1, seed=0) == 1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_many_times_continues_bit_for_bit(tmp_path, seed):
    assert killed_and_resumed(tmp_path, kills=8, seed=seed) >= 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_main_job_reaches_97_percent_at_70_percent_compression(tmp_path, seed):
    config = train.default_config("digits", seed=seed)
    run = train.Run(config, data.digits(), tmp_path)
    run.train(Quiet())
    summary = run.summary()
    assert summary["test_accuracy"] >= 0.97
    assert summary["compression"] >= 0.70
