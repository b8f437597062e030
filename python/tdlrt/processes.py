"""The processes of one training run, as `torchrun` starts them: `torchrun --nproc-per-node=2 -m tdlrt train …`.

Every step has the batch it would have with one process; each process takes every so-many-th image of it.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class ProcessError(RuntimeError):
    """Another process of the run ended or cannot be reached."""


class Alone:
    """The run is one process."""

    rank, size = 0, 1

    def wrap(self, model):
        return model

    def device(self, device):
        return device

    def total(self, numbers):
        """Sum over the processes."""
        return numbers

    def take_buffers(self, model):
        """Buffers (batch-norm statistics) as process 0 has them."""


class Together(Alone):
    """One process of several."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def wrap(self, model):
        return DistributedDataParallel(model)

    def device(self, device):
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return device

    def total(self, numbers):
        dist.all_reduce(numbers)
        return numbers

    def take_buffers(self, model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def current():
    """The processes of this run as they are now: `Alone`, or `Together` once joined."""
    return Together() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Alone()


def rank():
    """Of this process, before or after it joined the others."""
    return int(os.environ.get("RANK", 0)) if started_together() else 0


def started_together():
    """Whether `torchrun`, or what does as it does, started this process with others."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def joined(device, timeout=timedelta(minutes=10)):
    """Meets the other processes, if there are any, for the time of the block.

    Raises ProcessError when one of them is gone.
    """
    if not started_together() or dist.is_initialized():
        yield
        return
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
        yield
        dist.destroy_process_group()
    except RuntimeError as error:
        # torch has classes for some of these, gloo's own errors are plain.
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error):
            raise ProcessError("another process of the run ended or cannot be reached; see what it said") from error
        raise
