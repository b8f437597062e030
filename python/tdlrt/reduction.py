"""Averages Tucker gradients over the processes of a data-parallel run.

`DistributedDataParallel` averages dense gradients itself, inside the backward pass. Tucker parameters change shape,
which its reducer cannot follow, so they are left out of it and averaged here: δU and ∇_C L first, then, in the bases
that all processes compute alike from them, the augmented core gradients.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# What one all-reduce carries at most; large enough to reach full bandwidth, small enough to bound the copy.
BUCKET_BYTES = 25 * 2**20


class LocalReducer:
    """One process: nothing to do."""

    def average_gradients(self, layers):
        pass

    def average(self, tensors):
        pass

    def maximum(self, values):
        return values


class GroupReducer:
    """The processes of a `torch.distributed` group. Every method is a collective: all processes must call it."""

    def __init__(self, group, layers):
        self._group, self._size = group, dist.get_world_size(group)
        source = dist.get_global_rank(group, 0)
        for layer in layers:
            for parameter in (layer.core, *layer.factors):
                if parameter is not None:
                    dist.broadcast(parameter.data, source, group=group)

    def average_gradients(self, layers):
        """Replaces the gradients of cores and factors by their averages; the local tensors themselves stay."""
        parameters = [
            p for layer in layers for p in (layer.core, *layer.factors) if p is not None and p.grad is not None
        ]
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


def reducer_for(model, layers):
    """What averages the gradients of this model's Tucker layers.

    Raises ValueError for a DDP model whose reducer would follow Tucker parameters.
    """
    if not isinstance(model, DistributedDataParallel):
        return LocalReducer()
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
