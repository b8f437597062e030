"""Checkpoints of `tdlrt train`: one file that holds a whole run, replaced atomically, read without executing anything.

>>> from tdlrt import checkpoint
>>> stored = checkpoint.load("runs/demo/checkpoint.pt")
>>> model = checkpoint.network(stored)        # takes pixels in [0, 1]
"""

import contextlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

if sys.platform != "win32":
    import fcntl

import torch

from tdlrt import models
from tdlrt.convert import plan, tuckerize

FORMAT = "tdlrt checkpoint"
VERSION = 1
# What a checkpoint holds. All of it is tensors, numbers, strings and containers of these.
KEYS = ("config", "network", "model", "optimizer", "random", "progress", "metrics", "history")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not one of ours; the message names the file."""


def write_atomically(path, write):
    """Calls `write(binary_file)` and puts the result at `path` in one step.

    Whatever happens, `path` holds either the whole old contents or the whole new ones, also after a power cut: the data
    reach the disk under another name in the same folder before the rename, and the rename reaches it before the return.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # the file that was asked for
        raise
    _sync_folder(path.parent)


def _sync_folder(folder):
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def hold(folder):
    """Makes the folder and keeps it for this process; deletes what a process that was killed while writing left there.

    Raises CheckpointError when another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made a folder for results: {error.strerror or error}") from error
    with _locked(folder):
        for path in folder.glob(".*.tmp"):
            path.unlink()
        yield


@contextlib.contextmanager
def _locked(folder):
    if sys.platform == "win32":
        yield
        return
    # The kernel lets go of the lock when the process ends, however it ends.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is being written to by another tdlrt") from error
        yield
    finally:
        os.close(descriptor)


def save(path, contents):
    """Writes a checkpoint with the entries `KEYS`; the file that was there stays until the new one is complete."""
    if set(contents) != set(KEYS):
        raise ValueError(f"contents has {sorted(contents)}; a checkpoint has {sorted(KEYS)}")
    whole = io.BytesIO()  # torch's writer answers a full disk with an error of its own
    torch.save({"format": FORMAT, "version": VERSION, **contents}, whole)
    write_atomically(path, lambda file: file.write(whole.getbuffer()))


def load(path, device="cpu"):
    """The contents of a checkpoint: a dict with the entries `KEYS`.

    Raises CheckpointError, in one sentence that names the file, for a missing, truncated, damaged or foreign one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    try:
        # torch reads past flipped bits; the archive's checksums do not.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        contents = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is truncated or not a checkpoint of `tdlrt train`") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # torch, pickle and zlib each have their own exceptions for contents that they cannot or will not read.
        raise CheckpointError(f"{path} is damaged or not a checkpoint of `tdlrt train`") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of `tdlrt train`")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {contents.get('version')} of the checkpoint format; this tdlrt reads {VERSION}"
        )
    missing = [key for key in KEYS if key not in contents]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return {key: contents[key] for key in KEYS}


@contextlib.contextmanager
def understood(what):
    """Around the reading of contents: entries that are missing or of another kind become a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{what} is not as `tdlrt train` writes it: {type(error).__name__}: {said}") from error


def network(contents):
    """The network of a checkpoint, in evaluation mode: dense or with Tucker layers at the ranks it had.

    Raises CheckpointError for contents that describe none.
    """
    with understood("the network of the checkpoint"):
        return _network(contents)


def _network(contents):
    own, config = contents["network"], contents["config"]
    model = models.build(own["name"], own["image_shape"], own["classes"], own["mean"], own["std"])
    model = model.to(getattr(torch, config["dtype"]))
    if not config["dense"]:
        # Rank 1 is cheap to build; loading resizes every layer to the ranks in the state dict, which alone says what is
        # dense: defaults have changed, and `compress` leaves what it cannot make smaller.
        eligible = [d.name for d in plan(model, min_features=0) if d.reason is None]
        dense = [name for name in eligible if f"{name}.weight" in contents["model"]]
        tuckerize(model, ranks=1, modes=config["modes"], skip=dense, min_features=0)
    model.load_state_dict(contents["model"])
    return model.eval()
