"""Adapters: a pretrained model stays frozen, and a low-rank correction of its weights is trained by the same step.

>>> model = tdlrt.adapt(model, ranks=8)
>>> optimizer = tdlrt.TDLRT(model, lr=0.05, tol=0.1)
>>> criterion(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
>>> model = tdlrt.merge(model)               # plain layers again
"""

from collections.abc import Sequence
from typing import Any

import torch

from tdlrt.convert import Model, prepare_ddp, replace_eligible, replace_modules, tucker_class
from tdlrt.layers import TuckerAdapter
from tdlrt.layers.base import Modes, Ranks
from tdlrt.summary import check_module, tucker_layers


def adapt(
    model: Model,
    ranks: Ranks | dict[str, Ranks] = 8,
    modes: Modes = "channels",
    skip: Sequence[str] = (),
    min_features: int = 8,
) -> Model:
    """Freezes a model and puts a trainable Tucker weight beside every eligible `Conv1d/2d/3d` and `Linear`.

    Every weight becomes `W0 + Tucker` with a zero core and random orthonormal factors: the model computes what it
    computed. A zero core gives the factors no gradient, so the first step of `TDLRT` moves cores only, and from the
    second on bases and ranks follow the gradient.

    Args:
        model: changed in place and returned (a model that is itself one layer is returned as a new one). All of its
            parameters are frozen; set `requires_grad` again on those that shall be trained too (a new head, norms).
        ranks: where they start, as in `tuckerize`; but a layer that a dict does not name, or names with None, gets no
            adapter: `{"*.q_proj": 8, "*.v_proj": 8}` adapts two projections of every block.
        modes, skip, min_features: as in `tuckerize`. A small head gets an adapter, since beside a frozen weight nothing
            else would train it.

    With several processes give the bare model to `TDLRT(model, process_group=torch.distributed.group.WORLD)`: where all
    else is frozen, `DistributedDataParallel` refuses to wrap it.

    What gets no adapter is logged at level INFO with the reason; `tdlrt.plan(model, min_features=8)` lists those that
    no `ranks` changes.

    >>> model = tdlrt.adapt(torch.nn.Sequential(torch.nn.Linear(64, 32)), ranks=2)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)       # 32·2 + 2·2 + 64·2
    196
    """

    def adapter(layer, own_ranks):
        if own_ranks is None and isinstance(ranks, dict):
            return "ranks does not name it"
        dtype = layer.weight.dtype if layer.weight.dtype == torch.float64 else torch.float32
        delta = tucker_class(layer).like(layer, own_ranks, modes, bias=False, dtype=dtype).train(layer.training)
        for part in tucker_layers(delta).values():
            torch.nn.init.zeros_(part.core)
        return TuckerAdapter(layer, delta)

    model = replace_eligible(model, adapter, ranks, skip, min_features)
    deltas = {p for m in model.modules() if isinstance(m, TuckerAdapter) for p in m.delta.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in deltas)
    return prepare_ddp(model)


def merge(model: Model) -> Model:
    """Folds every adapter into its dense layer, in place, and returns the model with plain layers; they stay frozen.

    Exact to one rounding per weight. `tdlrt.to_dense(model)` does it in a copy.
    """
    check_module(model)
    adapters = {m: m.merge() for m in model.modules() if isinstance(m, TuckerAdapter)}
    return replace_modules(model, adapters)


def adapter_state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """The part of `model.state_dict()` that fine-tuning changes: small, and loaded with `strict=False`.

    These are the adapters, and other parameters that require gradients now, such as those of a new head. Running
    statistics of norms that stayed in training mode are not among them. Loading another one exchanges the adapters.

    >>> model = tdlrt.adapt(torch.nn.Sequential(torch.nn.Linear(64, 32)), ranks=2)
    >>> torch.save(tdlrt.adapter_state_dict(model), "adapter.pt")
    >>> again = tdlrt.adapt(torch.nn.Sequential(torch.nn.Linear(64, 32)))
    >>> again.load_state_dict(torch.load("adapter.pt"), strict=False)
    >>> tdlrt.ranks(again)
    {'0.delta': (2, 2)}
    """
    check_module(model)
    names = [n for n, m in model.named_modules() if isinstance(m, TuckerAdapter)]
    prefixes = tuple(f"{name}.delta." if name else "delta." for name in names)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {key: value for key, value in model.state_dict().items() if key in trained or key.startswith(prefixes)}
