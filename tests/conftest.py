import sys

import pytest
import torch

import tucker_kernels as tk
from tucker_kernels import cost_model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run on one thread, whatever the machine; those about threads say so themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The back ends that run on the host, one after the other."""
    with tk.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["small linear layers in torch", "in one call"])
def linear_layers(request, monkeypatch):
    """Those of a test, as they are and as if they were large, where they keep their projections."""
    if request.param == "in one call":
        monkeypatch.setattr(cost_model, "ONE_CALL", 0)


def _poisoned(function):
    """`function` (one of torch's uninitialised allocations), its memory filled with NaN for calls from our package."""

    def allocate(*args, **kwargs):
        result = function(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "tucker_kernels":
            nonsense = 255 if result.dtype == torch.uint8 else -(2**15)  # bytes of 255 read as NaN too
            result.fill_(torch.nan if result.is_floating_point() else nonsense)
        return result

    return allocate


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Outputs that our operators forget to write, or read before they write them, come out as NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
