"""`tdlrt train` over several processes: the run that one process makes, written once, and ended together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from tdlrt import checkpoint, data, train
from tdlrt.display import Quiet

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

CONFIG = {"epochs": 1, "batch_size": 256, "rank": 12, "threads": 1, "dtype": "float64", "lr": 0.02}
QUICK = [text for name, value in CONFIG.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def start(folder, world, *options):
    """The processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {**os.environ, "COLUMNS": "160", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-m", "tdlrt", "train", "--out", "run", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    return processes


def ended(processes):
    """[(exit status, standard output, standard error)]"""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        found.append((process.returncode, out, err))
    return found


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_make_the_run_of_one(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "run"
    alone.mkdir()
    run = train.Run(
        train.default_config("digits", **{**CONFIG, "epochs": 2, "schedule": "constant"}), data.digits(), alone
    )
    run.train(Quiet())
    (first, second) = ended(start(tmp_path, 2, *QUICK, "--schedule", "constant"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "test accuracy" in first[1]
    assert second[1:] == ("", "")
    # Continued by a single process: their number is no part of a run.
    train.Run.resumed(checkpoint.load(together), data.digits(), together, epochs=2).train(Quiet())
    a, b = lines(alone), lines(together)
    assert len(a) == len(b) == 2
    for x, y in zip(a, b):
        assert x["ranks"] == y["ranks"]
        assert x["accuracy"] == y["accuracy"]
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-9)
        assert x["test_loss"] == pytest.approx(y["test_loss"], rel=1e-9)
    models = [checkpoint.load(folder)["model"] for folder in (alone, together)]
    assert torch.allclose(models[0]["conv1.weight"], models[1]["conv1.weight"], rtol=0, atol=1e-9)


def test_when_one_is_asked_to_stop_all_stop_after_the_same_step(tmp_path):
    processes = start(tmp_path, 2, *QUICK, "--epochs", "500", "--checkpoint-every", "1")
    moved(tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    (first, second) = ended(processes)
    assert (first[0], second[0]) == (130, 130), first[2] + second[2]
    assert "everything is saved" in first[2]
    assert second[2] == ""
    checkpoint.load(tmp_path / "run")


@pytest.mark.long
def test_an_error_ends_all(tmp_path):
    for rank, (status, _, err) in enumerate(
        ended(start(tmp_path, 2, *QUICK, "--lr", "1e20", "--schedule", "constant"))
    ):
        assert status == 1
        assert err.count("diverged") == (rank == 0)
    processes = start(tmp_path, 2, *QUICK, "--epochs", "500", "--checkpoint-every", "1", "--overwrite")
    moved(tmp_path)
    processes[1].kill()
    (first, _) = ended(processes)
    assert first[0] == 1
    assert "another process" in first[2]
    assert "Traceback" not in first[2]
    checkpoint.load(tmp_path / "run")
    for status, _, err in ended(start(tmp_path, 2, "--batch-size", "1", "--out", "other")):
        assert status != 0
        assert "--batch-size" in err or "another process" in err or not err


def moved(folder):
    """Waits until the checkpoint has been written anew."""
    file = folder / "run" / "checkpoint.pt"
    before = file.stat().st_mtime_ns if file.exists() else None
    deadline = time.monotonic() + 60
    while not file.exists() or file.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
def test_torchrun_trains_with_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tdlrt"]
    done = subprocess.run([*launch, "train", *QUICK, "--out", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 2  # of the epoch, and of the run
    assert len(lines(tmp_path / "run")) == 1


@pytest.mark.parametrize("augment", [False, True])
def test_the_parts_of_a_batch_are_the_batch(augment):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(23)
    dataset = data.Dataset("cifar10", images, labels, images[:2], labels[:2], classes=23, levels=255, augment=augment)
    whole = list(dataset.batches(6, seed=1, epoch=2, dtype=torch.float64))
    parts = [list(dataset.batches(6, 1, 2, torch.float64, rank=r, processes=3)) for r in range(3)]
    for index, (pixels, labels) in enumerate(whole):
        assert len(labels) == dataset.batch_length(6, index)
        for r in range(3):
            assert torch.equal(parts[r][index][0], pixels[r::3])
            assert torch.equal(parts[r][index][1], labels[r::3])
