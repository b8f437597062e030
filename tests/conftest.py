import pytest
import torch

import tucker_kernels as tk


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """The back ends that run on the host, one after the other."""
    with tk.use_backend(request.param):
        yield request.param
