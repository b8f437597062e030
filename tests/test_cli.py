"""The `tdlrt` command as a user meets it: what it prints, what it writes, and one sentence for everything wrong."""

import builtins
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tdlrt import checkpoint, cli, export, models

import tucker_kernels

QUICK = ["--epochs", "1", "--batch-size", "256", "--rank", "12", "--threads", "1"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(capsys, *arguments):
    """(exit status, standard output, standard error)"""
    capsys.readouterr()
    status = cli.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def refused(capsys, *arguments, status=2):
    """The one sentence of an error, checked to be one: no traceback, no second line."""
    found, out, err = run(capsys, *arguments)
    assert found == status, err
    assert err.startswith("tdlrt: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


@pytest.fixture
def trained(capsys, tmp_path):
    status, out, _ = run(capsys, "train", *QUICK, "--out", "run")
    assert status == 0
    return tmp_path / "run", out


def test_train_says_where_everything_is(trained):
    folder, out = trained
    for name in ("checkpoint.pt", "metrics.jsonl", "summary.json", "ranks.png"):
        assert (folder / name).exists()
        assert f"run/{name}" in out
    assert "test accuracy" in out
    assert "compression" in out


def test_quiet_prints_nothing(capsys):
    assert run(capsys, "train", *QUICK, "--out", "run", "--quiet") == (0, "", "")


def test_help_shows_every_default(capsys):
    _, out, _ = run(capsys, "train", "--help")
    for text in ("--tol", "--rank", "--modes", "--integrator", "--resume", "digits", "one_pass", "channels", "float32"):
        assert text in out
    words = out.replace("│", " ").split()
    assert words.count("[default:") + words.count("\\[default:") >= 15


def test_without_a_command_there_is_help_and_no_error(capsys):
    status, out, err = run(capsys)
    assert status == 2
    assert "compress" in out + err
    assert "tdlrt: " not in err
    _, out, _ = run(capsys, "compress", "--help")
    assert out.count("<bool>") <= 1  # of typer's own --help
    assert "[default: none] [required]" not in " ".join(out.split())


def test_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, tucker_kernels.__version__ + "\n", "")


def test_a_finished_run_is_not_overwritten(capsys, trained):
    folder, _ = trained
    before = (folder / "checkpoint.pt").read_bytes()
    assert "--resume" in refused(capsys, "train", *QUICK, "--out", "run")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert run(capsys, "train", *QUICK, "--seed", "3", "--out", "run", "--overwrite", "--quiet")[0] == 0
    assert json.loads((folder / "summary.json").read_text())["seed"] == 3


def test_resume_continues_and_refuses_other_settings(capsys, trained):
    folder, _ = trained
    assert "--lr" in refused(capsys, "train", "--resume", "--out", "run", "--lr", "0.3")
    assert "--epochs" in refused(capsys, "train", "--resume", "--out", "run", "--epochs", "0")
    assert run(capsys, "train", "--resume", "--out", "run", "--epochs", "2", "--quiet")[0] == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert "does not exist" in refused(capsys, "train", "--resume", "--out", "elsewhere", status=1)


def test_info_shows_layers_ranks_and_accuracy(capsys, trained):
    status, out, _ = run(capsys, "info", "run")
    assert status == 0
    for text in ("conv2", "50×20×5×5", "fc1", "whole network", "lenet5 on digits"):
        assert text in out
    status, out, _ = run(capsys, "info", "run/checkpoint.pt", "--json")
    found = json.loads(out)
    model = checkpoint.network(checkpoint.load("run"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["layers"][0]["ranks"] == list(model.conv2.ranks[:2])


def test_export_runs_without_tdlrt(capsys, trained):
    folder, _ = trained
    assert run(capsys, "export", "run")[0] == 0
    pixels = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(pixels, "pixels.pt")
    program = (
        "import sys, torch\n"
        "loaded = torch.export.load('run/model.pt2').module()\n"
        "torch.save(loaded(torch.load('pixels.pt')), 'logits.pt')\n"
        "assert not any(m.split('.')[0] in ('tdlrt', 'tucker_kernels') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    expected = checkpoint.network(checkpoint.load(folder))(pixels)
    assert torch.allclose(torch.load("logits.pt"), expected, atol=1e-5)
    assert "--overwrite" in refused(capsys, "export", "run")


def test_compress_a_dense_run(capsys):
    assert run(capsys, "train", *QUICK, "--epochs", "3", "--dense", "--out", "dense", "--quiet")[0] == 0
    assert "It became larger" in run(capsys, "compress", "dense", "--out", "tiny", "--rank", "full")[1]
    assert "It became larger" not in run(capsys, "compress", "dense", "--out", "tiny", "--rank", "4", "--overwrite")[1]
    assert "no Tucker form is smaller" in refused(
        capsys, "compress", "dense", "--out", "tiny", "--tol", "0", "--overwrite"
    )
    assert checkpoint.load("tiny")["config"]["rank"] == 4  # what is refused replaces nothing
    status, out, _ = run(capsys, "compress", "dense", "--out", "small", "--tol", "0.6", "--epochs", "4")
    assert status == 0
    assert "before" in out
    model = checkpoint.network(checkpoint.load("small"))
    dense = checkpoint.network(checkpoint.load("dense"))
    for name in ("conv2", "fc1"):
        error = (getattr(model, name).weight - getattr(dense, name).weight).norm() / getattr(dense, name).weight.norm()
        assert 0.01 < error <= 0.6
    assert run(capsys, "train", "--resume", "--out", "small", "--quiet")[0] == 0
    assert "factorised already" in refused(capsys, "compress", "small", "--out", "other", status=1)


def test_compress_leaves_dense_what_it_cannot_make_smaller(capsys):
    assert run(capsys, "train", *QUICK, "--dense", "--out", "dense", "--quiet")[0] == 0
    contents = checkpoint.load("dense")
    left, _, right = torch.linalg.svd(contents["model"]["fc1.weight"], full_matrices=False)
    contents["model"]["fc1.weight"] = left[:, :3] @ right[:3]
    checkpoint.save("dense/checkpoint.pt", contents)
    status, out, _ = run(capsys, "compress", "dense", "--out", "mixed", "--tol", "0.01", "--epochs", "3")
    assert status == 0
    assert "Left dense, because they would not become smaller: conv2" in " ".join(out.split())
    assert "It became larger" not in out
    model = checkpoint.network(checkpoint.load("mixed"))
    assert model.fc1.ranks == (3, 3)
    assert torch.equal(model.conv2.weight, contents["model"]["conv2.weight"])
    assert run(capsys, "train", "--resume", "--out", "mixed", "--quiet")[0] == 0
    assert not torch.equal(checkpoint.network(checkpoint.load("mixed")).conv2.weight, contents["model"]["conv2.weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "imagenet"], ("--data", "imagenet", "digits, mnist, cifar10")),
        (["--tol", "1.5"], ("--tol", "1.5", "below 1")),
        (["--rank", "0"], ("--rank", "'0'", "integers from 1")),
        (["--rank", "2.5"], ("--rank", "2.5")),
        (["--epochs", "many"], ("--epochs", "many", "integers from 1")),
        (["--lr", "-1"], ("--lr", "-1", "above 0")),
        (["--modes", "window"], ("--modes", "window", "channels, all")),
        (["--integrator", "rk4"], ("--integrator", "rk4", "one_pass")),
        (["--dtype", "float16"], ("--dtype", "float16", "float64")),
        (["--device", "tpu"], ("--device", "tpu", "cpu")),
        (["--device", "cuda:7"], ("--device", "cuda:7", "CUDA devices")),
        (["--data", "mnist"], ("--data-dir", "mnist")),
        (["--data", "digits", "--model", "vgg16"], ("--model", "vgg16", "32×32")),
        (["--nonsense"], ("--nonsense",)),
        (["--seed", str(2**64)], ("--seed", str(2**64), "integers from 0")),
        (["--threads", str(2**40)], ("--threads", "integers from 1")),
        (["--out", ""], ("--out", "''", "folders")),
        (["--rank", "1e400"], ("--rank", "1e400", "fractions")),
        (["--resume", "--overwrite"], ("--overwrite", "--resume")),
    ],
)
def test_bad_options_are_one_sentence(capsys, arguments, words):
    message = refused(capsys, "train", *arguments)
    for word in words:
        assert word in message


def test_bad_files_are_one_sentence(capsys, tmp_path):
    folder = tmp_path / "mnist"
    assert "mnist does not exist" in refused(capsys, "train", "--data", "mnist", "--data-dir", folder, status=1)
    file = tmp_path / "a file"
    file.write_bytes(b"")
    assert "a file is not a folder" in refused(capsys, "train", "--data", "mnist", "--data-dir", file, status=1)
    folder.mkdir()
    assert "train-images-idx3-ubyte.gz" in refused(capsys, "train", "--data", "mnist", "--data-dir", folder, status=1)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03")[:-3])
    assert "truncated" in refused(capsys, "train", "--data", "mnist", "--data-dir", folder, status=1)
    assert "does not exist" in refused(capsys, "info", "nowhere", status=1)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for command in (["info"], ["export"], ["compress", "--out", "x"]):
        assert "noise.pt" in refused(capsys, command[0], "noise.pt", *command[1:], status=1)


EDITS = {
    "config without dense": lambda c: c["config"].pop("dense"),
    "config a number": lambda c: c.update(config=3),
    "a dtype torch has not": lambda c: c["config"].update(dtype="float7"),
    "no network": lambda c: c.update(network={}),
    "another network": lambda c: c["network"].update(name="resnet9"),
    "a weight less": lambda c: c["model"].popitem(),
    "a weight of another size": lambda c: c["model"].update({"fc1.bias": torch.zeros(3)}),
    "no accuracy": lambda c: c.update(metrics=[{}]),
    "no progress": lambda c: c.update(progress={}),
    "no optimiser": lambda c: c.update(optimizer={}),
    "no random state": lambda c: c.update(random={}),
}


def test_a_checkpoint_with_other_contents_is_one_sentence(capsys, trained):
    folder, _ = trained
    before = (folder / "checkpoint.pt").read_bytes()
    for name, edit in EDITS.items():
        (folder / "checkpoint.pt").write_bytes(before)
        contents = checkpoint.load("run")
        edit(contents)
        checkpoint.save("run/checkpoint.pt", contents)
        spoilt = (folder / "checkpoint.pt").read_bytes()
        commands = [("train", "--resume", "--epochs", "2", "--out", "run", "--quiet")]
        if name not in ("no optimiser", "no random state"):  # which are read by nothing else
            commands += [("info", "run"), ("info", "run", "--json"), ("export", "run")]
        for command in commands:
            assert "is not as `tdlrt train` writes it" in refused(capsys, *command, status=1), name
        assert (folder / "checkpoint.pt").read_bytes() == spoilt, name
        assert not (folder / "model.pt2").exists()


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_full_disk_is_one_sentence_and_loses_nothing(capsys, trained):
    import resource

    folder, _ = trained
    files = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for command in (["train", "--resume", "--epochs", "2", "--out", "run", "--quiet"], ["export", "run"]):
            assert "File too large" in refused(capsys, *command, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
    assert run(capsys, "train", "--resume", "--epochs", "2", "--out", "run", "--quiet")[0] == 0


def test_a_place_that_cannot_be_written_is_one_sentence(capsys, trained):
    folder, _ = trained
    (folder / "taken").mkdir()
    for out, words in (("nowhere/model.pt2", "No such file"), ("run/summary.json/x", "Not a directory")):
        message = refused(capsys, "export", "run", "--out", out, status=1)
        assert out in message
        assert words in message
    assert "run/taken: Is a directory" in refused(
        capsys, "export", "run", "--out", "run/taken", "--overwrite", status=1
    )
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_diverging_run_says_so(capsys):
    message = refused(capsys, "train", *QUICK, "--lr", "1e20", "--schedule", "constant", "--out", "run", status=1)
    assert "diverged" in message
    assert "--lr" in message
    checkpoint.load("run")  # the first checkpoint is there and readable


def test_without_the_extra_the_command_says_what_to_install(capsys, monkeypatch):
    real = builtins.__import__

    def without_typer(name, *rest):
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *rest)

    for name in [n for n in sys.modules if n.split(".")[0] == "typer" or n in ("tdlrt.commands", "tdlrt.options")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("tdlrt.commands", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_typer)
    assert "pip install 'tucker-kernels[train]'" in refused(capsys, "train", status=1)


def test_every_model_builds_and_runs():
    for name, size in (("lenet5", 28), ("vgg16", 32), ("resnet18", 32)):
        model = models.build(name, (3, size, size), 10, [0.5] * 3, [0.2] * 3)
        assert model(torch.rand(2, 3, size, size)).shape == (2, 10)
    lenet = models.build("lenet5", (1, 28, 28), 10, [0.1], [0.3])
    assert sum(p.numel() for p in lenet.parameters()) == 431_080  # Caffe's LeNet5


def test_a_program_that_computes_something_else_is_not_written(capsys, trained, monkeypatch):
    true = export.to_sequential

    def wrong(model):
        chain = true(model)
        with torch.no_grad():
            next(chain.parameters()).mul_(1.01)
        return chain

    monkeypatch.setattr(export, "to_sequential", wrong)
    assert "differs from the network" in refused(capsys, "export", "run", "--out", "wrong.pt2", status=1)
    assert not Path("wrong.pt2").exists()
