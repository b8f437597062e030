"""Data-parallel training over gloo processes on this machine."""

import os
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta

import pytest
import tdlrt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def network(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 9, 16), nn.Tanh(), nn.Linear(16, 4)),
    )
    return tdlrt.tuckerize(model.to(dtype), ranks=0.3, min_features=8)


def batch(step, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 8, 8, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(0, 4, (size,), generator=generator)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


OPTIONS = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3, "tol": 0.05}


def flat(model, optimizer):
    values = [p.detach().flatten().double() for p in model.parameters()]
    values += [s["momentum_buffer"].flatten().double() for s in optimizer.state.values()]
    return torch.cat(values)


def assert_equal_everywhere(values):
    """Bitwise equal on all ranks."""
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, len(values))
    assert len(set(sizes)) == 1, f"sizes differ: {sizes}"
    everyone = [torch.empty_like(values) for _ in sizes]
    dist.all_gather(everyone, values)
    assert all(torch.equal(everyone[0], other) for other in everyone)


def single_process(steps, size, integrator="one_pass", options=()):
    model = network(0)
    optimizer = tdlrt.TDLRT(model, integrator=integrator, **{**OPTIONS, **dict(options)})
    for step in range(steps):
        x, y = batch(step, size)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return tdlrt.to_dense(model).state_dict(), tdlrt.ranks(model)


# ---- what the processes run: each returns nothing and asserts ---------------------------------------------


def equals_one_process(rank, world, integrator, micro_batches):
    size, steps = 4 * world, 6
    ddp = DistributedDataParallel(network(seed=rank))  # other ranks start elsewhere; rank 0's weights are taken
    optimizer = tdlrt.TDLRT(ddp, integrator=integrator, **OPTIONS)
    for step in range(steps):
        x, y = (t[rank::world] for t in batch(step, size))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = 0.0
            for i in range(micro_batches):
                last = i == micro_batches - 1
                with nullcontext() if last else ddp.no_sync():
                    part = loss_of(ddp, x[i::micro_batches], y[i::micro_batches]) / micro_batches
                    part.backward()
                loss += part.detach()
            return loss

        optimizer.step(closure)
        assert_equal_everywhere(flat(ddp, optimizer))
    expected, ranks = single_process(steps, size, integrator)
    assert tdlrt.ranks(ddp.module) == ranks
    for name, value in tdlrt.to_dense(ddp.module).state_dict().items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-9), name


def compiled_equals_eager(rank, world):
    ends = []
    for compiled in (False, True):
        model = network(seed=0)
        ddp = DistributedDataParallel(model)
        optimizer = tdlrt.TDLRT(ddp, **OPTIONS)
        if compiled:
            model.compile(backend="aot_eager")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(ddp, *(t[rank::world] for t in batch(step, 4 * world))).backward()
            optimizer.step()
            assert_equal_everywhere(flat(ddp, optimizer))
        ends.append(tdlrt.to_dense(model).state_dict())
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=0, atol=1e-11), name


def stays_bitwise_equal(rank, world, steps):
    ddp = DistributedDataParallel(network(seed=rank, dtype=torch.float32))
    optimizer = tdlrt.TDLRT(ddp, **{**OPTIONS, "tol": 0.02})
    seen = {str(tdlrt.ranks(ddp.module))}
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, *batch(1000 * rank + step, 3, torch.float32)).backward()
        optimizer.step()
        seen.add(str(tdlrt.ranks(ddp.module)))
        if step % 20 == 0 or step == steps - 1:
            assert_equal_everywhere(flat(ddp, optimizer))
    assert len(seen) > 1


def non_finite_on_one_rank(rank, world, policy):
    ddp = DistributedDataParallel(network(seed=0))
    optimizer = tdlrt.TDLRT(ddp, on_nonfinite=policy, **OPTIONS)
    loss_of(ddp, *batch(rank, 4)).backward()
    if rank == 1:
        ddp.module[2].factors[0].grad[0, 0] = float("nan")
    before = flat(ddp, optimizer)
    if policy == "raise":
        with pytest.raises(tdlrt.NonFiniteError):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
    assert torch.equal(before, flat(ddp, optimizer))
    optimizer.zero_grad()
    loss_of(ddp, *batch(rank + 7, 4)).backward()
    optimizer.step()
    assert_equal_everywhere(flat(ddp, optimizer))


def disagreement_on_one_rank(rank, world):
    ddp = DistributedDataParallel(network(seed=0))
    optimizer = tdlrt.TDLRT(ddp, **OPTIONS)
    loss_of(ddp, *batch(rank, 4)).backward()
    if rank == 1:
        gradient = ddp.module[2].core.grad
        gradient += torch.linspace(0, 1, gradient.numel(), dtype=gradient.dtype).view_as(gradient)
    with pytest.raises(RuntimeError, match="not a multiple"):
        optimizer.step()


def dies(rank, world):
    ddp = DistributedDataParallel(network(seed=0))
    optimizer = tdlrt.TDLRT(ddp, **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(ddp, *batch(step, 4))
        loss.backward()
        if rank == 1 and step == 1:
            os._exit(0)  # gone without a word, in the middle of a step
        try:
            optimizer.step()
        except (RuntimeError, dist.DistError):
            assert rank == 0
            os._exit(0)  # nothing to agree on with a dead peer
    raise AssertionError("rank 0 went on alone")


def followed_by_ddp(rank, world):
    model = nn.Sequential(network(seed=0), nn.Identity())  # tuckerize marked the inner module, DDP reads the outer
    with pytest.raises(ValueError, match="prepare_ddp"):
        tdlrt.TDLRT(DistributedDataParallel(model), **OPTIONS)
    tdlrt.TDLRT(DistributedDataParallel(tdlrt.prepare_ddp(model)), **OPTIONS)


# ---- dense parameters in shards, Tucker parameters on every process ----------------------------------------


def sharded(seed):
    """Over two processes; with four there are two replicas of that."""
    model = network(seed)
    options = {"ignored_params": set(tdlrt.tucker_parameters(model))}
    if dist.get_world_size() == 4:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def step_on(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)


def gathered(model):
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


def dense_weights(model):
    plain = network(0)
    plain.load_state_dict(gathered(model))
    return tdlrt.to_dense(plain).state_dict()


def sharded_equals_one_process(rank, world, integrator, options):
    size, steps = 4 * world, 6
    model = sharded(seed=0)  # fully_shard takes each process's own rows, so dense weights must agree before
    for p in tdlrt.tucker_parameters(model):
        p.data.mul_(1 + rank)  # rank 0's are taken
    assert type(model[0].weight).__name__ == "DTensor"
    optimizer = tdlrt.TDLRT(model, integrator=integrator, **{**OPTIONS, **options})
    for step in range(steps):
        step_on(model, optimizer, *(t[rank::world] for t in batch(step, size)))
        assert_equal_everywhere(torch.cat([p.detach().flatten() for p in tdlrt.tucker_parameters(model)]))
    expected, ranks = single_process(steps, size, integrator, options)
    assert tdlrt.ranks(model) == ranks
    for name, value in dense_weights(model).items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-9), name


def sharded_checkpoint(rank, world, folder, integrator, base, options):
    """A run that is stored, loaded into a fresh model of other ranks, and continued equals one that was not."""

    def started(seed):
        model = sharded(seed)
        return model, tdlrt.TDLRT(model, integrator=integrator, base=base, **options)

    def continued(model, optimizer, steps):
        for step in steps:
            step_on(model, optimizer, *(t[rank::world] for t in batch(step, 4 * world)))

    model, optimizer = started(0)
    before = {n: p.clone() for n, p in gathered(model).items()}
    ranks = tdlrt.ranks(model)
    get_state_dict(model, optimizer)  # makes states by a step at learning rate zero, which must change nothing
    assert tdlrt.ranks(model) == ranks
    untouched = network(0)
    untouched.load_state_dict(before)
    for name, value in tdlrt.to_dense(untouched).state_dict().items():
        assert torch.allclose(dense_weights(model)[name], value, rtol=0, atol=1e-12), name
    continued(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    continued(model, optimizer, range(4, 7))

    other, other_optimizer = started(5)
    tdlrt.take_ranks(other, dcp.FileSystemReader(folder).read_metadata(), prefix="model.")
    weights, state = get_state_dict(other, other_optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_model_state_dict(other, weights)
    set_optimizer_state_dict(other, other_optimizer, state, options=StateDictOptions(strict=False))
    assert other_optimizer.steps == optimizer.steps - 3
    continued(other, other_optimizer, range(4, 7))
    assert tdlrt.ranks(model) != ranks
    assert tdlrt.ranks(other) == tdlrt.ranks(model)
    expected = dense_weights(model)
    for name, value in dense_weights(other).items():
        assert torch.equal(value, expected[name]), name


def sharded_non_finite(rank, world):
    model = sharded(seed=0)
    optimizer = tdlrt.TDLRT(model, **OPTIONS)
    loss_of(model, *batch(rank, 4)).backward()
    if rank == 1:
        model[0].weight.grad.to_local()[0] = float("nan")
    with pytest.raises(tdlrt.NonFiniteError, match=r"0\.weight"):
        optimizer.step()


def sharded_over_two_dimensions(rank, world):
    model = network(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "parts"))
    for parameter in ("weight", "bias"):
        whole = getattr(model[0], parameter).data
        model[0].register_parameter(parameter, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(0)])))
    with pytest.raises(ValueError, match="allowed is one mesh"):
        tdlrt.TDLRT(model, **OPTIONS)


def sharded_wrongly(rank, world):
    with pytest.raises(ValueError, match=r"ignored_params=set\(tdlrt\.tucker_parameters"):
        tdlrt.TDLRT(fully_shard(network(0)), **OPTIONS)


def adapters_equal_one_process(rank, world, wrapped):
    """Where all else is frozen a wrapper has nothing to do, and the optimiser averages alone."""

    def adapted(seed):
        model = tdlrt.adapt(tdlrt.to_dense(network(0)), ranks=2)
        model[0].requires_grad_(True)
        torch.manual_seed(seed)
        for parameter in tdlrt.tucker_parameters(model):
            if parameter.ndim == 2 and parameter.any():
                nn.init.orthogonal_(parameter)
        return model

    def trained(model, part, inner=None, **more):
        optimizer = tdlrt.TDLRT(model, **OPTIONS, **more)
        for step in range(5):
            step_on(model, optimizer, *(t[part] for t in batch(step, 4 * world)))
        return tdlrt.to_dense(inner or model).state_dict()

    model, part = adapted(rank), slice(rank, None, world)
    if wrapped:
        found = trained(DistributedDataParallel(model), part, model)
    else:
        found = trained(model, part, process_group=dist.group.WORLD)
    for name, value in trained(adapted(0), slice(None)).items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-9), name


def _process(rank, world, rendezvous, jobs):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for function, *arguments in jobs:
        try:
            function(rank, world, *arguments)
        except BaseException:
            print(f"rank {rank}, {function.__name__}{tuple(arguments)}:", file=sys.stderr)
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group, and now and then abort an interpreter that is taken down


def run(tmp_path, world, *jobs):
    """Runs the jobs one after the other on `world` processes; starting those takes longer than most jobs."""
    mp.spawn(_process, (world, str(tmp_path / "rendezvous"), jobs), nprocs=world)


def test_two_processes_equal_one(tmp_path):
    """Equal one process on the joined batch, stay bitwise equal, and stop together."""
    run(
        *(tmp_path, 2),
        (equals_one_process, "one_pass", 1),
        (equals_one_process, "one_pass", 2),  # accumulation under no_sync()
        (equals_one_process, "two_pass", 1),
        (stays_bitwise_equal, 30),
        (non_finite_on_one_rank, "raise"),
        (non_finite_on_one_rank, "skip"),
        (disagreement_on_one_rank,),
        (followed_by_ddp,),
        (adapters_equal_one_process, False),
        (adapters_equal_one_process, True),
    )


def test_two_processes_with_shards(tmp_path):
    run(
        *(tmp_path, 2),
        (sharded_equals_one_process, "one_pass", {"tol": 0.01}),
        (sharded_equals_one_process, "two_pass", {"max_grad_norm": 0.05}),
        (sharded_non_finite,),
        (sharded_wrongly,),
        (sharded_checkpoint, str(tmp_path / "one"), "one_pass", "sgd", {**OPTIONS, "tol": 0.01}),
        (sharded_checkpoint, str(tmp_path / "two"), "two_pass", "adam", {"lr": 0.02, "tol": 0.1}),
    )


def test_a_process_that_dies_does_not_hang_the_others(tmp_path):
    run(tmp_path, 2, (dies,))


@pytest.mark.long
def test_two_compiled_processes(tmp_path):
    run(tmp_path, 2, (compiled_equals_eager,))


@pytest.mark.long
def test_four_processes_with_two_replicas_of_the_shards(tmp_path):
    run(
        *(tmp_path, 4),
        (sharded_equals_one_process, "one_pass", {"tol": 0.01}),
        (sharded_equals_one_process, "one_pass", {"max_grad_norm": 0.05}),
        (sharded_non_finite,),
        (sharded_checkpoint, str(tmp_path / "one"), "one_pass", "sgd", {**OPTIONS, "tol": 0.01}),
        (sharded_over_two_dimensions,),
    )


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_many_steps_and_other_integrators(tmp_path, world):
    run(
        *(tmp_path, world),
        (stays_bitwise_equal, 200),
        (equals_one_process, "parallel", 1),
        (equals_one_process, "standard", 1),
    )
