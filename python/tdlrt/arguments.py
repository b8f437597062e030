"""What `TDLRT` accepts: each argument checked by itself and against the others, and the base optimiser made of them."""

import inspect
import math
from collections.abc import Iterable

import torch

from tdlrt.adam import Adam, AdamW
from tdlrt.integrators import INTEGRATORS
from tdlrt.layers import TuckerLayer
from tdlrt.muon import Muon
from tdlrt.pairs import RETAIN
from tdlrt.rank_choice import COSTS
from tdlrt.transport import moving_entries
from tucker_kernels.validation import at_least, choice, flag, number

BASES = {"sgd": torch.optim.SGD, "adam": Adam, "adamw": AdamW, "muon": Muon}
# The arguments with a few allowed values.
CHOICES = {
    "integrator": tuple(INTEGRATORS),
    "tolerance_mode": ("global", "per_mode"),
    "on_nonfinite": ("raise", "skip"),
    "retain": RETAIN,
    "budget_of": tuple(COSTS),
}
# What a captured step can have: the other settings decide on the host.
CAPTURABLE = {"integrator": ("one_pass",), "base": tuple(BASES), "retain": ("deferred",), "budget": (None,)}


def check_options(capturable, **options):
    """Raises ValueError or TypeError for an argument that is not allowed; see `TDLRT`."""
    flag("capturable", capturable)
    for name, allowed in CHOICES.items():
        choice(name, options[name], allowed)
    for name, allowed in CAPTURABLE.items() if capturable else ():
        if options[name] not in allowed:
            raise ValueError(
                f"{name} is {options[name]!r} with capturable=True; allowed: {', '.join(map(repr, allowed))}; other "
                "settings decide on the host"
            )
    for name in ("rank_multiple", "min_rank", "basis_every", "rank_every"):
        positive(name, options[name])
    for name in ("budget", "max_rank"):
        if options[name] is not None:
            positive(name, options[name])
    max_rank, min_rank = options["max_rank"], options["min_rank"]
    if max_rank is not None and max_rank < min_rank:
        raise ValueError(f"max_rank is {max_rank}, below min_rank={min_rank}")
    conditioning, norm = options["conditioning"], options["max_grad_norm"]
    number("conditioning", conditioning, "numbers from 0 on", _not_negative)
    if norm is not None:
        number("max_grad_norm", norm, "positive numbers or None", lambda value: value > 0)


def make_base(base, model, params, lr, momentum, weight_decay, capturable, options):
    """The base optimiser. Where a step is to be captured, Adam's counts its steps on the device."""
    if isinstance(base, str):
        kind = BASES[choice("base", base, tuple(BASES))]
    elif isinstance(base, type) and issubclass(base, torch.optim.Optimizer):
        kind = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}.get(base, base)
    else:
        got = repr(base) if isinstance(base, type) else type(base).__name__
        raise TypeError(f"base must be one of {', '.join(map(repr, BASES))} or an Optimizer subclass, got {got}")
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}; allowed are numbers from 0 on, or a tensor of one")
    if not isinstance(lr, torch.Tensor) or lr.device.type == "cpu":  # a device would have to be waited for
        number("lr", float(lr) if isinstance(lr, torch.Tensor) else lr, "numbers from 0 on", _not_negative)
    number("momentum", momentum, "numbers from 0 on", _not_negative)
    number("weight_decay", weight_decay, "numbers from 0 on", _not_negative)
    for name in {"nesterov", "maximize"} & set(options):
        flag(name, options[name])
    if options.get("differentiable"):
        raise ValueError(
            f"differentiable is {options['differentiable']!r}; a step that changes bases has no derivative"
        )
    if "dampening" in options:  # torch takes anything
        number("dampening", options["dampening"], "numbers from 0 on", _not_negative)
    accepted = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if kind is torch.optim.SGD or (momentum and ("momentum" in accepted or takes_any)):
        options = {"momentum": momentum, **options}
    elif momentum:
        raise ValueError(f"momentum is {momentum}, but base={base!r} has no momentum; pass its betas instead")
    elif capturable and any(p.device.type != "cpu" for p in model.parameters()):
        options = {"capturable": True, **options}
    unknown = [name for name in ("weight_decay", *options) if name not in accepted]
    if unknown and not takes_any:
        raise TypeError(
            f"{', '.join(unknown)}: not among the arguments of TDLRT and of its base {kind.__name__}, which takes "
            f"{', '.join(accepted)}"
        )
    if params is not None and (isinstance(params, (str, torch.Tensor)) or not isinstance(params, Iterable)):
        raise TypeError(f"params must be parameters or groups of them, got {type(params).__name__}")
    params = list(model.parameters()) if params is None else list(params)
    return kind(params, lr=lr, weight_decay=weight_decay, **options)


def check_processes(one, integrator, retain, capturable):
    """Raises ValueError for what works in one process only, and for `inline` with another integrator than one_pass."""
    if retain == "inline" and (integrator != "one_pass" or not one):
        what = f"integrator={integrator!r}" if integrator != "one_pass" else "several processes"
        raise ValueError(
            f"retain is 'inline' with {what}; it is for integrator='one_pass' in one process, where the gradients "
            "of a layer are final when the backward pass leaves it. Allowed here is 'deferred'"
        )
    if capturable and not one:
        raise ValueError("capturable is True with several processes; allowed is one")


def check_complete(model, given):
    """Raises ValueError where a trained parameter of the model is in no group."""
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in given]
    if missing:
        raise ValueError(
            f"params leaves out {', '.join(missing)}; every parameter of the model must be in a group, except frozen "
            "ones"
        )


def check_state(base):
    """Raises ValueError for a base whose state does not move with bases. One step of a small matrix shows its state."""
    matrix = torch.zeros(2, 3, requires_grad=True)
    matrix.grad = torch.ones_like(matrix)
    try:
        tried = type(base)([matrix], **base.defaults)
        tried.step()
    except Exception:  # whatever a user's class wants; the first step says the same
        return
    moving_entries(tried.state[matrix], matrix.shape)


def positive(name, value):
    """An integer from 1 on, which is returned."""
    return at_least(name, value, 1)


def _not_negative(value):
    return 0 <= value < math.inf


def _check_tolerance(name, tol):
    if tol is not None:
        number(name, tol, "numbers in [0, 1), or None for fixed ranks", lambda value: 0 <= value < 1)


def layer_tolerances(tol, layers):
    """{layer: tolerance} where `tol` names every layer; else nothing, and the parameter groups have it."""
    if not isinstance(tol, dict):
        _check_tolerance("tol", tol)
        return {}
    if set(tol) != set(layers):
        raise ValueError(
            f"tol names {sorted(map(str, tol))}, but the Tucker layers are {sorted(layers)}; a dict must name every "
            "one of them"
        )
    for name, value in tol.items():
        _check_tolerance(f"tol[{name!r}]", value)
    return {layers[name]: value for name, value in tol.items()}


def check_dtypes(layers):
    """Raises TypeError for cores and factors of half precision: a step would be lost in their rounding."""
    for name, layer in layers.items():
        if layer.core.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"model: {name} has {layer.core.dtype} parameters; cores and factors are kept in float32 or float64 "
                "(use torch.autocast for lower-precision arithmetic)"
            )


def check_frozen(layers):
    """Raises ValueError for a frozen core whose factors are trained."""
    for name, layer in layers.items():
        if not layer.core.requires_grad and any(f is not None and f.requires_grad for f in layer.factors):
            raise ValueError(
                f"model: {name}.core is frozen, but its factors are not, and they move only with their core; freeze "
                f"all of {name} (requires_grad_(False)) or only its factors"
            )


def check_shared(model, layers):
    """Raises ValueError where a Tucker parameter belongs to two layers: neither could move its bases alone."""
    owners = {}
    for name, layer in layers.items():
        for parameter in set(layer.weight_parameters()):
            owners.setdefault(parameter, []).append(name)
    lists = {layer.factors for layer in layers.values()}
    for name, module in model.named_modules():
        if not isinstance(module, TuckerLayer) and module not in lists:
            for parameter in module.parameters(recurse=False):
                if parameter in owners:
                    owners[parameter].append(name)
    shared = next((names for names in owners.values() if len(names) > 1), None)
    if shared:
        raise ValueError(
            f"model: {' and '.join(shared)} share a Tucker parameter; use one layer in both places, or tie dense "
            "weights before tuckerize, which leaves them dense"
        )
