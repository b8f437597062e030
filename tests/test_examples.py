"""The examples in docstrings run, and give what they say. Those of documents are in `test_readme.py`."""

import copy
import doctest
import importlib
import pkgutil
from contextlib import contextmanager

import pytest
import tdlrt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tdlrt import cli
from torch import nn
from torch.distributed.checkpoint import state_dict as of_torch
from torch.distributed.fsdp import fully_shard

import tucker_kernels as tk


def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10))


@contextmanager
def a_model_and_a_batch():
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    yield {"model": network(), "x": x, "y": y, "criterion": nn.CrossEntropyLoss()}


@contextmanager
def a_finished_run():
    train = ["--epochs", "1", "--batch-size", "256", "--rank", "12", "--threads", "1", "--out", "runs/demo"]
    assert cli.main(["train", *train]) == 0
    assert cli.main(["export", "runs/demo", "--out", "model.pt2"]) == 0
    yield {"pixels": torch.rand(2, 1, 8, 8)}


@contextmanager
def one_process_and_what_it_stored():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        stored = tdlrt.tuckerize(copy.deepcopy(model), ranks=3)
        optimizer = tdlrt.TDLRT(stored, lr=0.05, momentum=0.9)
        stored(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        weights, state = of_torch.get_state_dict(stored, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id="folder")
        given = {"model": model, "folder": "folder", "dcp": dcp, "FileSystemReader": dcp.FileSystemReader}
        yield given | {"fully_shard": fully_shard} | vars(of_torch)
        whole = of_torch.get_model_state_dict(model, options=of_torch.StateDictOptions(full_state_dict=True))
        for key, value in whole.items():  # torch takes a step of learning rate zero, which rounds the bases
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-6)
    finally:
        dist.destroy_process_group()


class WhatItSays(doctest.OutputChecker):
    """A call without an output beside it is made for its effect, and may return something."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


GIVEN = {
    "tdlrt": a_model_and_a_batch,
    "tdlrt.adapters": a_model_and_a_batch,
    "tdlrt.checkpoint": a_finished_run,
    "tdlrt.export": a_finished_run,
    "tdlrt.sharding": one_process_and_what_it_stored,
}


def examples():
    """Of every module but those that need Triton."""
    for package in (tk, tdlrt):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not {"triton", "_C", "__main__"} & set(found.name.split(".")):
                yield from doctest.DocTestFinder().find(importlib.import_module(found.name), found.name)
        yield from doctest.DocTestFinder().find(package, package.__name__)


EXAMPLES = {test.name: test for test in examples() if test.examples}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with GIVEN.get(name, a_model_and_a_batch)() as given:
        test = EXAMPLES[name]
        test.globs |= {"torch": torch, "nn": nn, "tk": tk, "tdlrt": tdlrt, **given}
        said = []
        found = doctest.DocTestRunner(WhatItSays()).run(test, out=said.append)
        assert not found.failed, "".join(said)


def test_what_people_call_first_has_one():
    of_kernels = ("mode_dot", "multi_mode_dot", "tangent_basis", "hosvd_truncate")
    first = {f"tucker_kernels.functional.{name}" for name in of_kernels}
    first |= {"tucker_kernels.convolution.tucker_conv", "tucker_kernels.linear.tucker_linear"}
    first |= {"tdlrt.convert.tuckerize", "tdlrt.convert.to_sequential", "tdlrt.optimizer.TDLRT", "tdlrt.adapters.adapt"}
    assert first <= EXAMPLES.keys()
