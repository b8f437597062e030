"""Checkpoints: whole or not there, read without running anything, every defect one sentence."""

import os
import pickle
import subprocess
import sys

import pytest
import tdlrt
import torch
from tdlrt import checkpoint, models

NETWORK = {"name": "lenet5", "image_shape": [1, 8, 8], "classes": 10, "mean": [0.3], "std": [0.4]}


def small_contents(min_features=8):
    torch.manual_seed(0)
    model = models.build("lenet5", (1, 8, 8), 10, [0.3], [0.4])
    tdlrt.tuckerize(model, ranks={"conv2": (7, 5), "fc1": 6, "fc2": 3}, min_features=min_features)
    config = {"dense": False, "modes": "channels", "dtype": "float32"}
    empty = {key: {} for key in checkpoint.KEYS}
    return {**empty, "config": config, "network": NETWORK, "model": model.state_dict(), "metrics": []}, model


@pytest.fixture
def stored(tmp_path):
    contents, _ = small_contents()
    checkpoint.save(tmp_path / "checkpoint.pt", contents)
    return tmp_path / "checkpoint.pt"


def refusal(path):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("min_features", [0, 8, 16])
def test_the_network_comes_back_with_its_ranks(tmp_path, min_features):
    """Also where other layers were left dense than `tuckerize` leaves by default."""
    contents, model = small_contents(min_features)
    checkpoint.save(tmp_path / "checkpoint.pt", contents)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        again = checkpoint.network(checkpoint.load(path))
        assert tdlrt.ranks(again) == tdlrt.ranks(model)
        assert not again.training
        pixels = torch.rand(3, 1, 8, 8)
        assert torch.equal(again(pixels), model.eval()(pixels))


def test_every_truncation_is_refused(stored):
    raw = stored.read_bytes()
    for length in [*range(0, len(raw), len(raw) // 40), len(raw) - 1]:
        stored.write_bytes(raw[:length])
        refusal(stored)


def test_flipped_bits_are_refused_or_change_nothing(stored):
    expected = checkpoint.load(stored)["model"]
    raw = bytearray(stored.read_bytes())
    refused = 0
    for place in range(50, len(raw), len(raw) // 40):
        broken = bytearray(raw)
        broken[place] ^= 0x10
        stored.write_bytes(broken)
        try:
            found = checkpoint.load(stored)["model"]
        except checkpoint.CheckpointError:
            refused += 1
        else:
            # Padding between the parts of the archive carries nothing.
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert refused > 30


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_foreign_files_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    refusal(path)
    for contents in ({"model": {}}, torch.zeros(3), {"format": "other"}, Harmful()):
        torch.save(contents, path)
        refusal(path)
    path.write_bytes(pickle.dumps(Harmful()))
    refusal(path)
    path.write_bytes(b"not a checkpoint")
    refusal(path)
    assert not (tmp_path / "harmed").exists()
    own, _ = small_contents()
    torch.save({"format": checkpoint.FORMAT, "version": 99, **own}, path)
    assert "99" in refusal(path)
    del own["history"]
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **own}, path)
    assert "history" in refusal(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "summary.json"
    checkpoint.write_text(path, "old")

    def fail(file):
        file.write(b"half of the new")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_folder_is_held_by_one_process_and_swept(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"left by a killed process")
    (tmp_path / "mine.tmp").write_bytes(b"somebody's")
    program = "import sys; from tdlrt import checkpoint\nwith checkpoint.hold(sys.argv[1]): print('held')"
    with checkpoint.hold(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp"]
        second = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
        assert second.returncode != 0
        assert "CheckpointError" in second.stderr
    third = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert third.stdout == "held\n"


def test_the_new_file_takes_the_place_of_the_old_in_one_step(tmp_path, monkeypatch):
    """Who has the old one open still reads it; contents are on the disk before its name, its name before the end."""
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, true=true: (events.append(name), true(*a))[1])
    with open(path, "rb") as reader:
        checkpoint.write_atomically(path, lambda file: file.write(b"new contents"))
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new contents"
    assert events == ["fsync", "replace", "fsync"]
