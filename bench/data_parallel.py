"""When data-parallel Tucker gradients are better averaged: after the backward pass or, as DDP does, within it.

    python bench/data_parallel.py [--models lenet5 resnet18] [--processes 2] [--repeats 7] [--save]

DDP's reducer cannot follow parameters that change shape. `TDLRT` leaves Tucker parameters out of it and averages δU and
∇_C L after the backward pass, then the augmented core gradients. At fixed capacity the former two could travel while
the backward pass still runs; the augmented gradients exist only after that and travel as before, and every gradient has
the size of the capacity, not of the rank. DDP itself loses even those parameters, because a step passes through the
augmented shapes and torch then counts them as new; `Within` does what it would do: gradients in the order of their
arrival, in buckets, of which the first holds 1 MB. Buckets of one layer each overlap as much as can be.

gloo processes on one machine, one thread each, float32, fixed ranks, momentum 0.9. Steps start together and take turns.
"MB all-reduced" is the payload of one process and step; with two processes each sends as much.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from unittest import mock

import harness
import tdlrt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tdlrt import models, reduction
from torch import nn
from torch.nn.parallel import DistributedDataParallel

MODELS = {"lenet5": ((1, 28, 28), 64, 20), "resnet18": ((3, 32, 32), 32, 0.125)}  # shape, batch of all, ranks
OPTIONS = {"lr": 1e-3, "momentum": 0.9}
WARM_UP = 3


class Within(reduction.GroupReducer):
    """Averages the gradients of cores and factors in buckets that leave as soon as they are full."""

    def __init__(self, group, layers, most):
        super().__init__(group, layers)
        self._most, self._bucket, self._pending = most, [], []
        for parameter in (p for layer in layers for p in layer.weight_parameters()):
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter):
        self._bucket.append(parameter)
        if sum(p.nbytes for p in self._bucket) >= self._most:
            self._send()

    def _send(self):
        flat = torch.cat([p.grad.reshape(-1) for p in self._bucket])
        self._pending.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, self._bucket))
        self._bucket = []

    def average_gradients(self, layers):
        if self._bucket:
            self._send()
        for work, flat, bucket in self._pending:
            work.wait()
            flat /= self._size
            for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket])):
                parameter.grad = mean.view_as(parameter)
        self._pending = []


class Step:
    """One step of a wrapped model; `sent` counts the bytes that it all-reduces."""

    def __init__(self, model, optimizer, data):
        self.model, self.optimizer, self.data = model, optimizer, data
        ignored = model.parameters_to_ignore
        self.by_ddp = sum(p.nbytes for n, p in model.module.named_parameters() if n not in ignored)
        self.sent = 0

    def __call__(self):
        with mock.patch.object(dist, "all_reduce", self._counted(dist.all_reduce)):
            self.sent = self.by_ddp
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.data[0]), self.data[1]).backward()
            self.optimizer.step()

    def _counted(self, all_reduce):
        def call(tensor, *args, **kwargs):
            self.sent += tensor.nbytes
            return all_reduce(tensor, *args, **kwargs)

        return call


def candidates(dense, ranks, data):
    def tucker(ranks, bucket=None):
        model = DistributedDataParallel(tdlrt.tuckerize(copy.deepcopy(dense), ranks=ranks))
        optimizer = tdlrt.TDLRT(model, tol=None, **OPTIONS)
        if bucket is not None:
            optimizer.reducer = Within(model.process_group, list(optimizer.layers.values()), bucket)
        return Step(model, optimizer, data)

    model = DistributedDataParallel(copy.deepcopy(dense))
    return {
        "dense SGD in DDP": Step(model, torch.optim.SGD(model.parameters(), **OPTIONS), data),
        "after the backward pass": tucker(ranks),
        "within, buckets as in DDP": tucker(ranks, 2**20),
        "within, one layer each": tucker(ranks, 1),
        "within, as in DDP, capacity 2 r": tucker(2 * ranks, 2**20),
    }


def measure(name, world, rank, repeats):
    shape, size, ranks = MODELS[name]
    torch.manual_seed(0)
    dense = models.build(name, shape, 10, (0.0,) * shape[0], (1.0,) * shape[0])
    images, labels = torch.randn(size, *shape), torch.randint(0, 10, (size,))
    steps = candidates(dense, ranks, (images[rank::world], labels[rank::world]))
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    ends = [tdlrt.to_dense(steps[kind].model.module).state_dict() for kind in list(steps)[1:4]]
    for other in ends[1:]:  # all three compute the same
        for key, value in ends[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-3)
    times = {kind: [] for kind in steps}
    for _ in range(repeats):
        for kind, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return [
        {
            **{"model": name, "processes": world, "ranks": ranks, "averaged": kind},
            "MB all-reduced": step.sent / 1e6,
            "ms": 1e3 * medians[kind],
            "x after": medians[kind] / medians["after the backward pass"],
        }
        for kind, step in steps.items()
    ]


def process(rank, world, folder, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rows = []
    for name in options.models:
        found = measure(name, world, rank, options.repeats)
        rows += found
        if rank == 0:
            harness.print_table(found, title=f"{name}, {world} processes of one thread")
    if rank == 0 and options.save:
        harness.save("data_parallel", rows)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is taken down


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write bench/results/data_parallel.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (options.processes, folder, options), nprocs=options.processes)


if __name__ == "__main__":
    main()
