"""Models whose dense parameters `fully_shard` (FSDP2) keeps in shards; Tucker parameters are small and replicated.

>>> model = tdlrt.tuckerize(model, ranks=0.5)
>>> fully_shard(model, ignored_params=set(tdlrt.tucker_parameters(model)))
>>> optimizer = tdlrt.TDLRT(model, lr=0.05, tol=0.1)

A mesh of two dimensions, replicas of the shards (HSDP), may be given to `fully_shard` if it has all processes.

For lower-precision arithmetic use `torch.autocast`: `MixedPrecisionPolicy(param_dtype=…)` would cast inputs and biases
but not the Tucker parameters, which stay in float32.

`torch.distributed.checkpoint` saves such a model and its optimiser as any other. It loads into tensors that are there,
so a fresh model takes the stored ranks first:

>>> tdlrt.take_ranks(model, FileSystemReader(folder).read_metadata(), prefix="model.")
>>> weights, state = get_state_dict(model, optimizer)
>>> dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
>>> set_model_state_dict(model, weights)
>>> set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))   # factors have no state
"""

from typing import Any

import torch

from tdlrt.summary import tucker_layers


def tucker_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Cores and factors of all Tucker layers: the parameters whose shapes change, which no wrapper may follow."""
    return [p for layer in tucker_layers(model).values() for p in layer.weight_parameters()]


@torch.no_grad()
def take_ranks(model: torch.nn.Module, metadata: Any, prefix: str = "") -> None:
    """Gives every Tucker layer the ranks it has in a checkpoint of `torch.distributed.checkpoint`; weights become zero.

    metadata: what the storage reader's `read_metadata()` returns. prefix: of the model's keys there.
    Raises ValueError where a layer is not in the checkpoint, or has other sizes there, with no layer changed; TypeError
    for metadata and prefix of another kind.
    """
    stored = getattr(metadata, "state_dict_metadata", None)
    if not isinstance(stored, dict):
        raise TypeError(f"metadata must be what read_metadata() returns, got {type(metadata).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a text, got {type(prefix).__name__}")
    found = []
    for name, layer in tucker_layers(model).items():
        start = f"{prefix}{name}." if name else prefix
        keys = ["core", *(f"factors.{i}" for i in layer.modes)]
        shapes = [tuple(getattr(stored.get(start + key), "size", ())) for key in keys]
        ranks, sizes = shapes[0], layer.weight_shape
        if len(ranks) != len(sizes) or shapes[1:] != [(sizes[i], ranks[i]) for i in layer.modes]:
            raise ValueError(f"metadata has {dict(zip(keys, shapes))} at {start!r}; the layer's weight is {sizes}")
        zeros = [layer.core.new_zeros(n, r) if i in layer.modes else None for i, (n, r) in enumerate(zip(sizes, ranks))]
        found.append((layer, layer.core.new_zeros(ranks), zeros))
    for layer, core, factors in found:  # all or none
        layer.assign(core, factors)
