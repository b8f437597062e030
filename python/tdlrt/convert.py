"""Whole models: dense layers to Tucker layers and back."""

import copy
import fnmatch
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from tdlrt.layers import (
    TuckerAdapter,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerEmbedding,
    TuckerGroupedConv,
    TuckerLayer,
    TuckerLinear,
)
from tdlrt.layers.base import Modes, Ranks
from tdlrt.pairs import drop_recorders
from tdlrt.reduction import ignore_in_ddp
from tdlrt.summary import check_module, layer_parameters, tucker_layers
from tucker_kernels.validation import at_least, flag, shown

log = logging.getLogger("tdlrt")

# Factors beside a side of ten save little, and a fraction of ten is a rank of two.
MIN_FEATURES = 16

Model = TypeVar("Model", bound=nn.Module)  # a model that is itself one layer comes back as another class

TUCKER_CLASS = {nn.Conv1d: TuckerConv1d, nn.Conv2d: TuckerConv2d, nn.Conv3d: TuckerConv3d, nn.Linear: TuckerLinear}
# Layers with weights that stay dense, with the reason that is reported.
_LEFT_DENSE = {
    nn.MultiheadAttention: "multi-head attention reads its weights directly",
    nn.RNNBase: "recurrent layers read their weights directly",
    nn.modules.conv._ConvTransposeNd: "transposed convolutions have no Tucker form here",
    nn.Bilinear: "bilinear layers have no Tucker form here",
}
# Where a module keeps its forward and backward hooks.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


@dataclass(frozen=True)
class Decision:
    """What `tuckerize` does with one layer: `reason` says why it stays dense, or is None."""

    name: str
    layer: nn.Module
    reason: str | None


def plan(
    model: nn.Module, skip: Sequence[str] = (), min_features: int = MIN_FEATURES, embeddings: bool = False
) -> list[Decision]:
    """The layers of a model whose `weight` is a matrix or more, each with what `tuckerize` would do with it and why.

    Returns: list of `Decision` in the order of `model.named_modules()`.
    """
    check_module(model)
    listed = isinstance(skip, Collection) and not isinstance(skip, (str, bytes, Tensor))
    if not listed or not all(isinstance(n, str) for n in skip):
        raise TypeError(f"skip must be a sequence of names, got {shown(skip)}")
    at_least("min_features", min_features, 0)
    flag("embeddings", embeddings)
    kinds: dict[type[nn.Module], Any] = {**TUCKER_CLASS, **({nn.Embedding: TuckerEmbedding} if embeddings else {})}
    decisions: list[Decision] = []
    blocked: list[str] = []
    owners: dict[object, set[int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(id(module))
        if any(name.startswith(prefix) for prefix in blocked) or isinstance(module, TuckerLayer):
            continue
        if isinstance(module, (TuckerAdapter, TuckerGroupedConv)):
            blocked.append(f"{name}." if name else "")
            continue
        reason = next((why for kind, why in _LEFT_DENSE.items() if isinstance(module, kind)), None)
        if reason is not None:
            blocked.append(f"{name}." if name else "")
        elif any(isinstance(module, kind) for kind in kinds):
            reason = _why_dense(name, module, kinds, skip, min_features)
        elif isinstance(module, nn.Embedding):
            reason = "tuckerize replaces embeddings with embeddings=True only"
        elif _has_matrix(module):
            reason = f"{type(module).__name__} is no class that has a Tucker form here"
        else:
            continue
        decisions.append(Decision(name, module, reason))
    return [
        Decision(d.name, d.layer, "its weight is shared with another layer")
        if d.reason is None and len(owners.get(d.layer.weight, ())) > 1
        else d
        for d in decisions
    ]


def _has_matrix(module):
    weight = module._parameters.get("weight")
    return weight is not None and not nn.parameter.is_lazy(weight) and weight.ndim > 1


def _why_dense(name, layer, kinds, skip, min_features):
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "a lazy layer has no weight before its first forward pass; run the model once"
    if nn.utils.parametrize.is_parametrized(layer):
        return f"its {' and '.join(layer.parametrizations)} is parametrized"
    if type(layer) not in kinds:
        return f"{type(layer).__name__} is a subclass that may compute something else"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
        return "named in skip"
    own = [name for name in (*layer._parameters, *layer._buffers) if name not in ("weight", "bias")]
    if own:
        return f"it has {', '.join(own)} beside its weight, as pruning and weight or spectral normalisation do"
    if isinstance(layer, nn.Embedding) and TuckerEmbedding.why_not(layer) is not None:
        return f"embedding with {TuckerEmbedding.why_not(layer)}"
    groups = getattr(layer, "groups", 1)
    smaller = min(layer.weight.shape[0] // groups, layer.weight.shape[1])
    if groups > 1 and smaller == 1:
        return f"depthwise convolution (groups={groups}): a group has a side of 1"
    if smaller < min_features:
        where = f" in each of its {groups} groups" if groups > 1 else ""
        return f"its smaller side{where} is {smaller}, below min_features={min_features}"
    return None


def tucker_class(layer):
    """The class that stands for a dense layer."""
    if isinstance(layer, nn.Embedding):
        return TuckerEmbedding
    return TuckerGroupedConv if getattr(layer, "groups", 1) > 1 else TUCKER_CLASS[type(layer)]


def tuckerize(
    model: Model,
    ranks: Ranks | dict[str, Ranks] = None,
    tol: float | None = None,
    modes: Modes = "channels",
    skip: Sequence[str] = (),
    min_features: int = MIN_FEATURES,
    method: Literal["hosvd", "hooi"] = "hosvd",
    embeddings: bool = False,
    keep_larger: bool = False,
) -> Model:
    """Replaces every eligible `Conv1d/2d/3d` and `Linear` of a model by its Tucker layer, by truncated HOSVD.

    A grouped convolution gets a Tucker weight per group (`TuckerGroupedConv`). Forward and backward hooks of a layer go
    along to the new one; a layer whose weight is made from others (weight normalisation, pruning) stays dense.

    Args:
        model: changed in place and returned (a model that is itself one layer is returned as a new one).
        ranks: a fraction of each mode's full rank (float), a cap for every mode (int), a tuple, or a dict from layer
            name (patterns as in `fnmatch` allowed) to one of these; layers a dict does not name keep full rank.
        tol: instead of `ranks`, the relative error each weight may have. With neither, ranks are full.
        keep_larger: with `tol`, a layer whose core and factors would hold no fewer numbers than its weight stays dense;
            True replaces it all the same. `ranks` are always taken as given.
        modes: "channels" (a factor on output and input channels) or "all" (on the window too).
        skip: names or patterns of layers to leave dense.
        min_features: layers whose smaller side (of C_out, C_in; of each group) is below it stay dense, as the head of
            ten classes does; 0 for none.
        method: "hosvd", or "hooi" for weights a little nearer to the dense ones at the same ranks.
        embeddings: whether `nn.Embedding`s are replaced too (`TuckerEmbedding`).

    What stays dense is logged at level INFO with the reason; `tdlrt.plan` lists those that no `ranks` or `tol` changes.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 10))
    >>> tdlrt.ranks(tdlrt.tuckerize(model, ranks=0.5))          # a side of ten is below min_features
    {'0': (16, 8, 3, 3), '2': (16, 16)}
    """
    if ranks is not None and tol is not None:
        raise ValueError(f"give either ranks or tol: ranks is {shown(ranks)} and tol is {shown(tol)}")
    flag("keep_larger", keep_larger)

    def factorised(layer, ranks):
        new = tucker_class(layer).from_dense(layer, ranks=ranks, tol=tol, modes=modes, method=method)
        size = sum(layer_parameters(part) for part in tucker_layers(new).values())
        if tol is not None and not keep_larger and size >= layer.weight.numel():
            return f"its Tucker form at tol={tol} has {size} numbers, its weight {layer.weight.numel()}"
        return new

    return prepare_ddp(replace_eligible(model, factorised, ranks, skip, min_features, embeddings))


def replace_eligible(model, make, ranks, skip, min_features, embeddings=False):
    """The model with `make(layer, its ranks)` in the place of every eligible layer; what stays dense is logged.

    make: returns the new layer, or a text that says why this one stays.
    """
    decisions = plan(model, skip, min_features, embeddings)
    if isinstance(ranks, dict):
        _check_names("ranks", ranks, decisions)
    _check_names("skip", skip, decisions)
    replaced, seen = {}, set()
    for name, layer, reason in ((d.name, d.layer, d.reason) for d in decisions):
        if reason is None and layer not in seen:
            seen.add(layer)
            new = make(layer, _for_name(ranks, name) if isinstance(ranks, dict) else ranks)
            if isinstance(new, nn.Module):
                replaced[layer] = new
            else:
                reason = new
        if reason is not None:
            log.info("left dense: %s (%s)", name or "the model itself", reason)
    if not seen:
        log.warning("no layer is eligible, so the model stays as it is; tdlrt.plan(model) lists the reasons")
    elif not replaced:
        log.warning("no layer was replaced, so the model stays as it is; the log at level INFO says why")
    return replace_modules(model, replaced)


def prepare_ddp(model: Model) -> Model:
    """Lets `DistributedDataParallel(model)` leave Tucker parameters to `TDLRT`, which averages them itself.

    `tuckerize` does this for the model it returns; call it where Tucker layers sit in a larger module. Returns
    the model.
    """
    check_module(model)
    names = []
    for name, layer in model.named_modules():
        if isinstance(layer, TuckerLayer):
            prefix = f"{name}." if name else ""
            names += [prefix + own for own, _ in layer.named_parameters() if own != "bias"]
    ignore_in_ddp(model, names)
    return model


def _check_names(argument, patterns, decisions):
    names = [d.name for d in decisions]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} names {pattern!r}; allowed are names of layers, and patterns")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument} names {pattern!r}, but no such layer exists; there are {', '.join(names)}")


def _for_name(ranks, name):
    if name in ranks:
        return ranks[name]
    return next((value for pattern, value in ranks.items() if fnmatch.fnmatchcase(name, pattern)), None)


def replace_modules(model, replaced):
    """The model with every module that is a key of `replaced` exchanged for its value, wherever it is used.

    Forward and backward hooks go along.
    """
    for old, new in replaced.items():
        for hooks in _HOOKS:  # the very dictionaries, from which the handles that users hold remove their hooks
            vars(old)[hooks], vars(new)[hooks] = vars(new)[hooks], vars(old)[hooks]
    if model in replaced:
        return replaced[model]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() lists a shared layer once
            if child in replaced:
                setattr(module, name, replaced[child])
    return model


def to_dense(model: Model) -> Model:
    """A copy of the model with every Tucker layer replaced by its dense layer, and every adapter merged."""
    return _convert(model, lambda layer: layer.to_dense())


def to_sequential(model: Model) -> Model:
    """A copy of the model with every Tucker layer replaced by a chain of plain `nn.Conv*`/`nn.Linear` layers.

    Adapters are merged: a sum is no chain. `nn.TransformerEncoderLayer`s leave their inference fast path, which reads
    the weight of one dense layer.

    >>> tdlrt.to_sequential(tdlrt.TuckerLinear(20, 30, ranks=4))
    Sequential(
      (0): Linear(in_features=20, out_features=4, bias=False)
      (1): Linear(in_features=4, out_features=4, bias=False)
      (2): Linear(in_features=4, out_features=30, bias=True)
    )
    """
    return _keep_off_fast_path(_convert(model, lambda layer: layer.to_sequential()))


def _keep_off_fast_path(model):
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if any(isinstance(layer, nn.Sequential) for layer in (module.linear1, module.linear2)):
                module.activation_relu_or_gelu = 0  # what torch asks before it takes that path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _convert(model, function):
    check_module(model)
    model = copy.deepcopy(model)
    adapters = {m: m.merge() for m in model.modules() if isinstance(m, TuckerAdapter)}
    model = replace_modules(model, adapters)
    groups = {m for m in model.modules() if isinstance(m, TuckerGroupedConv)}
    inner = {layer for m in groups for layer in m.groups}
    layers = groups | {m for m in model.modules() if isinstance(m, TuckerLayer) and m not in inner}
    for layer in layers:
        drop_recorders(layer)
    return replace_modules(model, {layer: function(layer) for layer in layers})
