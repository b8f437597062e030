"""TDLRT: the geometry-aware, rank-adaptive training step for Tucker layers, as a `torch.optim.Optimizer`."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from tdlrt import arguments, momentum
from tdlrt.arguments import check_dtypes, check_frozen, positive
from tdlrt.capturable import CapturedStep, compact
from tdlrt.conditioning import conditioning_gradient
from tdlrt.core_steps import CoreSteps
from tdlrt.expansion import NonFiniteError, truncate
from tdlrt.integrators import FROM_PAIRS, INTEGRATORS
from tdlrt.integrators.parallel import redo, saturated
from tdlrt.pairs import KeptPairs
from tdlrt.rank_choice import RankChoice
from tdlrt.reduction import LocalReducer, clip_gradients, local, reducer_for
from tdlrt.summary import tucker_layers
from tdlrt.transport import follow_dtype
from tucker_kernels.validation import flag

log = logging.getLogger("tdlrt")


class TDLRT(torch.optim.Optimizer):
    """Trains the Tucker layers of a model on the manifold of low-rank weights, and everything else as usual.

    A step augments every factor U with the directions its gradient adds, V; updates the core in the bases [U|V] with
    the base optimiser; and truncates the core to the smallest ranks that keep the relative error below `tol`. The
    update depends on the weight alone, not on how it is factorised, and needs no small learning rate where the core
    has small singular values. Momentum moves with the bases; that of the named bases is kept outside
    them too.

    Args:
        model: a module, a `DistributedDataParallel` around one, or one that `fully_shard` was applied to (with
            `ignored_params=set(tdlrt.tucker_parameters(model))`); all of its parameters are stepped. The dense ones
            are updated once per step, in the same pass.
        lr, momentum, weight_decay: of the base optimiser. Weight decay on a core is weight decay on the weight.
        tol: relative truncation error per step and layer, in [0, 1); a dict {layer name: tol}; or None for fixed ranks.
            It is kept per parameter group and may be scheduled.
        integrator: how the gradient of the augmented core is obtained. "one_pass" (one forward and one backward pass:
            `loss.backward(); optimizer.step()`); "parallel" (the same to first order: only blocks with one
            new mode); "two_pass" and "standard" (two and d + 1 evaluations, `optimizer.step(closure)`; the closure
            computes the loss, calls backward and returns it).
        base: "sgd"; "adam" or "adamw", which have one second moment for a whole core, the mean over its entries, as it
            is the same in all bases; "muon", which moves all singular directions of a core's momentum equally far and
            is AdamW, with its arguments and learning rates, for everything else; or a `torch.optim.Optimizer` subclass
            that keeps momentum_buffer, exp_avg and exp_avg_sq and nothing else per entry.
        params: parameter groups as any torch optimiser takes them; default: all parameters in one group. Frozen ones
            may be left out and are then never stepped; trained ones that are not the model's may be added.
        tolerance_mode: "global" (the error of the whole core is at most tol) or "per_mode" (each mode's is).
        min_rank, max_rank: bounds on every adaptive rank.
        basis_every: bases and ranks move every so many steps; the steps between update cores only, which costs less.
        rank_every: ranks adapt on every so-many-th of those; on the others the bases move and the ranks stay.
        max_grad_norm: clips the global norm of all gradients, with the augmented ones for cores.
        on_nonfinite: "raise" a `NonFiniteError` when a gradient holds NaN or Inf, or "skip" the step and count it in
            `skipped_steps`. Either way nothing changes.
        process_group: for a model without a wrapper, the processes of `torch.distributed` over which the step averages
            all gradients, e.g. `torch.distributed.group.WORLD` for adapters, which leave a wrapper nothing to do.
        retain: of one_pass: inputs and output gradients of all layers are kept until the step ("deferred"), or those of
            a layer are used and freed inside the backward pass, as soon as its factors have their gradients ("inline":
            about the memory of training the factors plainly, a little slower; one backward pass per step).
        budget: what the whole model may have of `budget_of`, as `compression(model)` counts it, after every step that
            adapts ranks; the singular values of all layers compete for it. With `tol` ranks are what the tolerance
            wants, if that fits; with tol=None as large as fits.
        budget_of: "parameters" or "multiply_adds".
        rank_multiple: adaptive ranks are rounded up to a multiple of this (8 or 16 suit tensor cores) or to the largest
            rank that the step offers, twice the old one.
        conditioning: β of the regulariser β‖SSᵀ − α²I‖_F, α² = ‖S‖²/r, S the core unfolded along its output mode, r its
            rank: draws the singular values together (RobustDLRT, arXiv 2505.08022, for matrices).
        capturable: the step reads nothing from the device and keeps parameters and momentum in place, so that a CUDA
            graph can capture it: cores and factors keep their sizes, and ranks below them show as zero columns;
            `active_ranks()` and `compact()` read them. For one_pass with the bases that have names, in one process, not
            with `budget`, for which the host compares layers. The host also counts steps: with basis_every or
            rank_every capture a whole period, basis_every · rank_every steps, in one graph.
            Steps with NaN or Inf are undone on the device and counted in `captured.skipped`. Gradients must be those
            that the backward pass left (no GradScaler; clipping by `max_grad_norm`). Not yet tried on a GPU.
        base_options: passed to the base optimiser (nesterov, betas, eps, maximize, …).

    Source: Zangrando, Schotthöfer, Ceruti, Kusch & Tudisco, "Geometry-aware training of factorized layers in tensor
    Tucker format", arXiv 2305.19059.

    >>> model = torch.nn.Sequential(tdlrt.TuckerLinear(20, 30, ranks=8), torch.nn.Tanh(), torch.nn.Linear(30, 1))
    >>> optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, tol=0.3)
    >>> for x in torch.randn(30, 64, 20):
    ...     optimizer.zero_grad()
    ...     (model(x) - x.mean(1, keepdim=True)).square().mean().backward()
    ...     optimizer.step()
    >>> max(tdlrt.ranks(model)["0"]) < 8
    True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        tol: float | dict[str, float | None] | None = 0.1,
        integrator: Literal["one_pass", "parallel", "two_pass", "standard"] = "one_pass",
        base: Literal["sgd", "adam", "adamw", "muon"] | type[torch.optim.Optimizer] = "sgd",
        *,
        params: Iterable[Any] | None = None,
        tolerance_mode: Literal["global", "per_mode"] = "global",
        min_rank: int = 1,
        max_rank: int | None = None,
        basis_every: int = 1,
        rank_every: int = 1,
        max_grad_norm: float | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        process_group: Any = None,
        retain: Literal["deferred", "inline"] = "deferred",
        budget: int | None = None,
        budget_of: Literal["parameters", "multiply_adds"] = "parameters",
        rank_multiple: int = 1,
        conditioning: float = 0.0,
        capturable: bool = False,
        **base_options: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "model", "params", "base_options", "__class__")}
        self._arguments = {**given, **base_options}
        if not isinstance(model, torch.nn.Module):
            kind = type(model).__name__
            raise TypeError(f"model must be a torch.nn.Module, got {kind}; TDLRT takes the model, not its parameters")
        arguments.check_options(**given)
        self.model = model
        self.integrator, self.tolerance_mode, self.on_nonfinite = integrator, tolerance_mode, on_nonfinite
        self.min_rank, self.max_rank, self.max_grad_norm = min_rank, max_rank, max_grad_norm
        self.basis_every, self.rank_every, self.conditioning = basis_every, rank_every, conditioning
        self.rank_multiple = rank_multiple
        self.skipped_steps = 0
        self.truncation_errors: dict[str, float] = {}
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self.layers = tucker_layers(inner)
        self._layer_tol = arguments.layer_tolerances(tol, self.layers)
        if not self.layers:
            log.warning("the model has no Tucker layers (see tdlrt.tuckerize); every parameter is stepped as by base")
        arguments.check_shared(inner, self.layers)
        check_dtypes(self.layers)
        check_frozen(self.layers)
        self.reducer = reducer_for(model, self.layers, process_group)
        arguments.check_processes(isinstance(self.reducer, LocalReducer), integrator, retain, capturable)
        self.captured = CapturedStep(self) if capturable else None
        self._choose_ranks = None
        if budget is not None or rank_multiple > 1:
            self._choose_ranks = RankChoice(inner, rank_multiple, budget, budget_of, min_rank, tolerance_mode)
        self.base = arguments.make_base(base, inner, params, lr, momentum, weight_decay, capturable, base_options)
        if self.layers:
            arguments.check_state(self.base)
        defaults = {**self.base.defaults, "tol": None if isinstance(tol, dict) else tol}
        super().__init__(self.base.param_groups, {**defaults, "steps": 0, "bases_frozen": False})
        self._link()
        self._name_parameters()
        arguments.check_complete(inner, self._names)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.core in self._names}
        if isinstance(self.base, CoreSteps):
            self.base.cores = {layer.core: layer for layer in self.layers.values()}
        self.kept = KeptPairs(self.layers if integrator in FROM_PAIRS else {}, self, retain == "inline")

    def _link(self):
        # The base optimiser works on the very groups and states that users, schedulers and checkpoints see.
        self.base.param_groups, self.base.state = self.param_groups, self.state
        self._choose_kind_of_step()

    def _name_parameters(self):
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        own = {p: name for name, p in model.named_parameters()}
        places = [(i, j, p) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])]
        self._group_index = {p: i for i, _, p in places}
        self._names = {p: own.get(p, f"params[{i}][{j}]") for i, j, p in places}
        tucker = {p for layer in self.layers.values() if layer.core in self._names for p in layer.weight_parameters()}
        self._dense = [p for p in self._names if p not in tucker]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any torch optimiser, for parameters of dense layers. Raises ValueError for those of Tucker layers."""
        _check_dict("param_group", param_group, ("params",))
        super().add_param_group(param_group)
        if not hasattr(self, "kept"):  # torch's constructor comes here too
            return
        known = set(self.layers.values())
        new = {p: n for n, x in tucker_layers(self.model).items() if x not in known for p in x.weight_parameters()}
        found = sorted({new[p] for p in self.param_groups[-1]["params"] if p in new})
        if found:
            self.param_groups.pop()
            raise ValueError(f"param_group has Tucker parameters of {', '.join(found)}; make a new TDLRT for the model")
        self._name_parameters()

    @property
    def steps(self) -> int:
        """Steps taken so far; kept in the state dict."""
        return self.param_groups[0]["steps"]

    def _choose_kind_of_step(self):
        """Tells the layers whether the next step moves their bases."""
        moves = self.steps % self.basis_every == 0 and not self.param_groups[0]["bases_frozen"]
        for layer in self.layers.values():
            layer.train_bases = moves

    def freeze_bases(self, frozen: bool = True) -> None:
        """From the next forward pass on, steps update cores only, as convergence proofs of SGD want at the end."""
        self.param_groups[0]["bases_frozen"] = flag("frozen", frozen)
        self._choose_kind_of_step()

    def _group_of(self, parameter):
        return self.param_groups[self._group_index[parameter]]

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimiser, and the paths that layers chose, which stay until others are clearly faster."""
        found = super().state_dict()
        found["param_groups"][0]["paths"] = [
            [layer.chosen_paths.get(training) for training in (True, False)] for layer in self.layers.values()
        ]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any torch optimiser. Load the model first: ranks come from there.

        Raises TypeError for what is no dict, ValueError for one that is no optimiser's; nothing is loaded then.
        """
        _check_dict("state_dict", state_dict, ("state", "param_groups"))
        super().load_state_dict(state_dict)
        for layer, paths in zip(self.layers.values(), self.param_groups[0].pop("paths", ())):
            layer.chosen_paths = {training: path for training, path in zip((True, False), paths) if path is not None}
        for group in self.param_groups:  # of an older release
            for name in ("tol", "steps", "bases_frozen"):
                group.setdefault(name, self.defaults[name])
        self._link()

    def __reduce__(self):
        """A copy or a pickle has the model in it; `deepcopy((model, optimizer))` is a pair like the first."""
        groups = [dict(group) for group in self.param_groups]
        captured = None if self.captured is None else (self.captured.ranks, self.captured.skipped)
        return _rebuilt, (self.model, self._arguments, groups, dict(self.state), self.skipped_steps, captured)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.kept.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, or None.

        Gradients of Tucker parameters are consumed: their shapes change with the ranks. Raises `NonFiniteError` (or
        skips) when a gradient holds NaN or Inf, before anything is changed.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function or None, got {type(closure).__name__}")
        if self.captured is not None:
            return self._captured_step(closure)
        with torch.no_grad():
            try:
                loss, expansions = self._integrate(closure)
            except NonFiniteError as error:
                if self.on_nonfinite == "raise":
                    raise
                self.skipped_steps += 1
                log.warning("step skipped: %s", error)
                self.zero_grad()
                return None
            self._update(expansions)
            self.param_groups[0]["steps"] += 1
            self._choose_kind_of_step()
            self.kept.clear()
        return loss

    def _captured_step(self, closure):
        loss = None if closure is None else torch.enable_grad()(closure)()
        with torch.no_grad():
            self.captured()
        self.param_groups[0]["steps"] += 1
        self._choose_kind_of_step()
        self.kept.clear()
        return loss

    def active_ranks(self) -> dict[str, tuple[int, ...]]:
        """{layer name: ranks in use}; waits for the device where the optimiser is capturable."""
        if self.captured is None:
            return {name: layer.ranks for name, layer in self.layers.items()}
        active = {name: tuple(ranks.tolist()) for name, ranks in self.captured.ranks.items()}
        return {name: active.get(name, layer.ranks) for name, layer in self.layers.items()}

    @torch.no_grad()
    def compact(self, multiple: int = 1) -> None:
        """Cuts the layers of a capturable optimiser to the ranks in use, rounded up to a multiple.

        Reads the ranks and makes new tensors: for between captures.
        """
        if self.captured is None:
            raise RuntimeError("compact() is for capturable=True; without it tensors have the size of the ranks anyway")
        compact(self, positive("multiple", multiple))

    def _integrate(self, closure):
        integrator = self.integrator
        check_dtypes(self.layers)  # model.half(), model.double() or a requires_grad_() may have come since
        check_frozen(self.layers)
        for p, state in self.state.items():
            follow_dtype(p, state)
        if closure is None and integrator not in FROM_PAIRS and self._only_makes_states():
            integrator = "one_pass"
        return INTEGRATORS[integrator](self, closure)

    def _only_makes_states(self):
        """Whether this is the step by which torch.distributed.checkpoint makes optimiser states, of zeros at rate 0."""
        rates = [group["lr"] for group in self.param_groups]
        return all(map(_is_zero, rates)) and not any(local(p.grad).any() for p in self._names if p.grad is not None)

    def _update(self, expansions):
        """Steps everything at the augmented points, truncates, and consumes the Tucker gradients."""
        for e in expansions:
            for factor in e.parameters:
                if factor is not None:
                    factor.grad = None
        if self.conditioning:
            for e in expansions:
                e.layer.core.grad[e.known_block] += self.conditioning * conditioning_gradient(e.core)
        self.clip(expansions)
        self.step_base(expansions)
        self.truncation_errors = truncate(self._truncation_rules(expansions), self.state, self._choose_ranks)
        if self.integrator == "parallel":
            self._redo_saturated(expansions)
        for e in expansions:
            e.layer.core.grad = None

    def step_base(self, expansions):
        """Steps the base optimiser at the augmented points."""
        momentum.begin(expansions, self.state, self._group_of, self.basis_every)
        self.base.step()

    def clip(self, expansions):
        """Scales all gradients, those of augmented cores included, so that their norm is at most `max_grad_norm`."""
        if self.max_grad_norm is None:
            return
        norm = clip_gradients([p for p in self._names if p.grad is not None], self.max_grad_norm, self.reducer)
        for e in expansions:
            e.clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
            e.scale = e.scale * e.clip

    def _redo_saturated(self, expansions):
        """Rejects the parallel step of layers that kept every new direction, and takes the full one instead."""
        for p in self._names:
            p.grad = None
        again = [e for e in expansions if saturated(e) and redo(e, self)]
        if again:
            self.step_base(again)
            self.truncation_errors.update(truncate(self._truncation_rules(again), self.state, self._choose_ranks))

    def layers_with_gradient(self):
        """{name: layer} of the Tucker layers whose core has a gradient; the others are not stepped."""
        return {name: layer for name, layer in self.layers.items() if layer.core.grad is not None}

    def momentum_group(self, core):
        """The parameter group of a core, where the base optimiser's momentum goes along with the bases; else None."""
        group = self._group_of(core)
        return group if momentum.goes_along(self.base, group) else None

    def tolerance(self, layer):
        """Relative truncation error that a layer may have now, or None for fixed ranks."""
        return self._layer_tol.get(layer, self._group_of(layer.core)["tol"])

    @property
    def adapts_ranks(self):
        """Whether ranks may change in this step, if its bases move."""
        return self.steps // self.basis_every % self.rank_every == 0

    def learning_rates(self):
        """{parameter: learning rate of its group}."""
        return {p: group["lr"] for group in self.param_groups for p in group["params"]}

    def dense_gradients(self):
        """[(name, gradient)] of all other parameters that have one."""
        return [(self._names[p], local(p.grad)) for p in self.dense_parameters_with_gradient()]

    def dense_parameters_with_gradient(self):
        return [p for p in self._dense if p.grad is not None]

    def _truncation_rules(self, expansions):
        """[(expansion, what `hosvd_truncate` needs to know of it)] of the layers whose bases may move."""
        rules = []
        for e in expansions:
            if not e.layer.train_bases or not any(f is not None and f.requires_grad for f in e.parameters):
                continue
            tol = self.tolerance(e.layer)
            if tol is None and self._choose_ranks is not None and self._choose_ranks.adapts_without_tolerance:
                tol = 0.0
            still = _is_zero(self._group_of(e.layer.core)["lr"])
            if tol is None or not self.adapts_ranks or still:  # without a step, no loss of rank
                rules.append((e, {"ranks": tuple(e.core.shape)}))
                continue
            sizes = [n if f is None else f.shape[0] for n, f in zip(e.core.shape, e.factors)]
            most = [min(n, self.max_rank or n) if i in e.layer.modes else n for i, n in enumerate(sizes)]
            least = [min(self.min_rank, m) for m in most]
            rules.append((e, {"tol": tol, "min_rank": least, "max_rank": most}))
        return [(e, {**rule, "tolerance_mode": self.tolerance_mode}) for e, rule in rules]

    def __repr__(self):
        return f"TDLRT(integrator={self.integrator!r}, {len(self.layers)} Tucker layers, base={self.base!r})"


def _rebuilt(model, arguments, groups, state, skipped_steps, captured):
    optimizer = TDLRT(model, params=groups, **arguments)
    optimizer.state.update(state)
    optimizer.skipped_steps = skipped_steps
    if captured is not None:
        optimizer.captured.ranks, optimizer.captured.skipped = captured
    return optimizer


def _check_dict(name, value, keys):
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
    if not set(keys) <= set(value):
        raise ValueError(f"{name} has the keys {sorted(map(str, value))}; allowed are those with {' and '.join(keys)}")


def _is_zero(lr):
    on_host = not isinstance(lr, torch.Tensor) or lr.device.type == "cpu"  # a device would have to be waited for
    return on_host and float(lr) == 0
