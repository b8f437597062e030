"""Averages Tucker gradients over the processes of a data-parallel run.

`DistributedDataParallel` and `fully_shard` average dense gradients themselves, inside the backward pass. Tucker
parameters change shape, which neither can follow, so they are left out and averaged here: δU and ∇_C L first, then, in
the bases that all processes compute alike from them, the augmented core gradients. Sending the former during the
backward pass instead, as DDP would at a fixed capacity, gains nothing that can be told from noise on two gloo processes
at the same ranks (0.95 to 1.14 of the time) and takes 1.4 times as long where the capacity is twice the rank
(`bench/data_parallel.py`).
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# What one all-reduce carries at most; large enough to reach full bandwidth, small enough to bound the copy.
BUCKET_BYTES = 25 * 2**20


class LocalReducer:
    """One process: nothing to do."""

    sharded = False

    def average_gradients(self, layers):
        pass

    def average(self, tensors):
        pass

    def maximum(self, values):
        return values


class GroupReducer:
    """The processes of a `torch.distributed` group. Every method is a collective: all processes must call it."""

    def __init__(self, group, layers, others=(), shards=None):
        """others: parameters that nothing else averages. shards: the group that the remaining ones are spread over."""
        self._group, self._size = group, dist.get_world_size(group)
        self._others, self._shards, self.sharded = list(others), shards, shards is not None
        source = dist.get_global_rank(group, 0)
        for parameter in (*(p for layer in layers for p in layer.weight_parameters()), *self._others):
            dist.broadcast(parameter.data, source, group=group)

    def average_gradients(self, layers):
        """Replaces the gradients of cores and factors by their averages; the local tensors themselves stay."""
        parameters = [p for layer in layers for p in layer.weight_parameters()] + self._others
        parameters = [p for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = parameter.grad.clone(memory_format=torch.contiguous_format)
        self.average([p.grad for p in parameters])

    def average(self, tensors):
        """Averages tensors in place, in buckets of one dtype."""
        pending = []
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            pending.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, bucket))
        for work, flat, bucket in pending:
            work.wait()
            flat /= self._size
            for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket])):
                tensor.copy_(mean.view_as(tensor))

    def maximum(self, values):
        """Elementwise maximum; NaN on any process is NaN on all."""
        largest = torch.where(torch.isnan(values), torch.inf, values)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest

    def total(self, value):
        """Sum over the processes that hold the shards of one parameter."""
        value = value.clone()
        dist.all_reduce(value, group=self._shards)
        return value


def local(tensor):
    """What this process holds of a tensor: its shard of a `DTensor`, the tensor itself otherwise."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    return hasattr(tensor, "device_mesh")  # a DTensor; importing the class takes a while


def clip_gradients(parameters, most, reducer):
    """Scales gradients so that their norm, shards of other processes included, is at most `most`. Returns the norm."""
    if not reducer.sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, most)

    zero = torch.zeros((), dtype=torch.float64, device=local(parameters[0].grad).device)

    def square(sharded):
        norms = [torch.linalg.vector_norm(local(p.grad)).double() for p in parameters if is_sharded(p) == sharded]
        return torch.stack([zero, *norms]).square().sum()

    norm = (square(sharded=False) + reducer.total(square(sharded=True))).sqrt()
    for parameter in parameters:
        local(parameter.grad).mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _buckets(tensors):
    bucket, size = [], 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (tensor.dtype != bucket[0].dtype or size + nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket


def ignore_in_ddp(model, names):
    """Makes a later `DistributedDataParallel(model)` leave these parameters out of its reducer.

    The attribute is torch's own hook for it; DDP reads it from the module it is given.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(ignored | set(names))


def reducer_for(model, layers, process_group=None):
    """What averages the gradients of this model's Tucker layers; with a process_group, of all of its parameters.

    Raises ValueError for a model whose wrapper would follow Tucker parameters.
    """
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    if not isinstance(model, DistributedDataParallel):
        return _for_bare_model(model, layers, process_group)
    if process_group is not None:
        raise ValueError("process_group is given, but the model is a DistributedDataParallel, which has its own")
    ignored = set(model.parameters_to_ignore)
    followed = [
        name
        for name, layer in layers.items()
        if any(
            f"{name}.{part}" not in ignored
            for part in ("core", *(f"factors.{i}" for i, f in enumerate(layer.factors) if f is not None))
        )
    ]
    if followed:
        raise ValueError(
            f"model: DistributedDataParallel follows the Tucker parameters of {', '.join(followed)}, whose shapes "
            "change; wrap the very module that tdlrt.tuckerize returned, or call tdlrt.prepare_ddp(module) before that"
        )
    return GroupReducer(model.process_group, layers.values())


def _for_bare_model(model, layers, process_group):
    tucker = {p: name for name, layer in layers.items() for p in layer.weight_parameters()}
    dense = [p for p in model.parameters() if p not in tucker]
    shards = [p for p in dense if is_sharded(p)]
    followed = sorted({name for p, name in tucker.items() if is_sharded(p)})
    if followed:
        raise ValueError(
            f"model: fully_shard shards the Tucker parameters of {', '.join(followed)}, whose shapes change; call "
            "fully_shard(module, ignored_params=set(tdlrt.tucker_parameters(model)))"
        )
    if not shards:
        return LocalReducer() if process_group is None else GroupReducer(process_group, layers.values(), dense)
    if process_group is not None:
        raise ValueError("process_group is given, but the model is sharded over processes of its own")
    group, along = _mesh_groups(shards)
    others = [p for p in dense if not is_sharded(p)]
    return GroupReducer(group, layers.values(), others, along)


def _mesh_groups(shards):
    """(all processes of the run, those that hold the shards of one parameter): the same unless shards have replicas.

    Raises ValueError for parameters on several meshes, and for more than one dimension of shards.
    """
    layouts = {(p.device_mesh, tuple(str(placement) for placement in p.placements)) for p in shards}
    mesh, placements = shards[0].device_mesh, shards[0].placements
    along = [i for i, placement in enumerate(placements) if placement.is_shard()]
    replicas = all(placement.is_shard() or placement.is_replicate() for placement in placements)
    hybrid = mesh.ndim == 2 and mesh.size() == dist.get_world_size()
    if len({mesh for mesh, _ in layouts}) > 1 or len(along) != 1 or not replicas or not (mesh.ndim == 1 or hybrid):
        raise ValueError(
            f"model is sharded as {sorted(map(str, layouts))}; allowed is one mesh, of one dimension or, over all "
            "processes, of two: replicas and shards"
        )
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD, mesh.get_group(along[0])
