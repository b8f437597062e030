"""The one-pass step at fixed capacity: no shape depends on data, and the host reads nothing.

Cores and factors keep the size they had when the optimiser was made, the capacity. A layer's rank may be anything up to
it: the columns beyond are exactly zero, and so are their rows of the core. Zero columns get zero gradients
(∇_{U_i} L = M_i Mat_i(C)ᵀ) and give zero directions, so a step is the ordinary one on the active part. Parameters and
momentum stay in place, as a captured CUDA graph needs, and everything is put back on the device where a gradient holds
NaN or Inf. What gradients were multiplied by since the backward pass cannot be found without reading it; they must be
what the backward pass left.

A rank never counts directions in which the core is zero to rounding, though `min_rank`, `rank_multiple` or a step that
keeps its ranks ask for more: those of the bases and zero columns could not be told apart.
"""

import math

import torch

import tucker_kernels as tk
from tdlrt.adam import OneSecondMoment
from tdlrt.conditioning import conditioning_gradient
from tdlrt.expansion import Expansion, carried_states, enter, rotated_bases
from tdlrt.transport import corner

# Directions that rounding alone put there are dropped also at tol=0: they have no orthonormal coordinates.
_LEAST_TOL = 16


class CapturedStep:
    """ranks: {layer name: int64 tensor on the device, the active rank of each mode}; skipped: how many steps found NaN
    or Inf, likewise."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.ranks, self.skipped = {}, None

    def __call__(self):
        o = self._optimizer
        expansions = [Expansion.at(name, layer, o) for name, layer in o.layers_with_gradient().items()]
        finite = self._augment(expansions)
        others = o.dense_parameters_with_gradient()
        gradients = [e.core_gradient for e in expansions] + [p.grad for p in others]
        if not gradients:
            return
        finite.append(torch.stack([torch.linalg.vector_norm(g).double() for g in gradients]).isfinite().all())
        undo = [(t, t.clone()) for p in others for t in (p, *_tensors(o.state.get(p)))]
        fresh = [p for p in others if not o.state.get(p)]
        enter(expansions, o.state)
        for e in expansions:
            e.layer.core.grad = e.core_gradient
            for factor in e.parameters:
                if factor is not None:
                    factor.grad = None
            if o.conditioning:
                active = None if e.factors[0] is None else _in_use(e.factors[0])
                e.layer.core.grad[e.known_block] += o.conditioning * conditioning_gradient(e.core, active)
        o.clip(expansions)
        if isinstance(o.base, OneSecondMoment):
            o.base.entries = {e.layer.core: _entries_in_use(e) for e in expansions}
        o.step_base(expansions)
        undo += [(t, None) for p in fresh for t in _tensors(o.state.get(p))]
        new = self._truncate(expansions, finite)
        ok = torch.stack(finite).all()
        for tensor, before in undo:
            _select(ok, tensor, before, into=tensor)
        for each in new:
            self._leave(each[0], ok, *each[1:])
        self.skipped = (~ok).long() if self.skipped is None else self.skipped.add_(~ok)

    def ranks_later(self):
        """A function that gives {layer name: ranks} as they are now. Only calling it waits for the device."""
        copies = {name: ranks.to("cpu", non_blocking=True, copy=True) for name, ranks in self.ranks.items()}
        done = [torch.cuda.Event() for _ in range(any(r.is_cuda for r in self.ranks.values()))]
        for event in done:
            event.record()

        def read():
            for event in done:
                event.synchronize()
            return {name: tuple(ranks.tolist()) for name, ranks in copies.items()}

        return read

    def _augment(self, expansions):
        """Augmented bases and gradients of all layers; returns conditions that must hold."""
        places = [(e, mode) for e in expansions for mode in e.layer.modes if e.parameters[mode].grad is not None]
        finite = []
        if places:
            bases = [e.factors[mode] for e, mode in places]
            directions = [e.direction(mode, _outside(e.parameters[mode]), self._optimizer) for e, mode in places]
            found, counts = tk.tangent_basis(bases, directions)
            for (e, mode), V in zip(places, found):
                e.extend(mode, V)
            finite.append((counts >= 0).all())
        for e in expansions:
            e.core_gradient = e.layer.core.grad
            if e.grew:
                gradient = self._optimizer.kept.pairs(e.name, e.layer).augmented_gradient(e)
                gradient[e.known_block] = e.core_gradient
                e.core_gradient = gradient
        return finite

    def _truncate(self, expansions, finite):
        """[(expansion, core, factors, momentum)] at capacity, after the step; adds to the conditions."""
        o = self._optimizer
        moved = [e for e in expansions if e.grew]
        new = [(e, e.layer.core.data, e.factors, o.state.get(e.layer.core, {})) for e in expansions if not e.grew]
        if not moved:
            return new
        tol = [max(o.tolerance(e.layer) or 0.0, _least_tol(e.core)) for e in moved]
        most = [
            tuple(min(n, o.max_rank or n) if i in e.layer.modes else n for i, n in enumerate(e.core.shape))
            for e in moved
        ]
        whole = o.rank_multiple > 1 or not o.adapts_ranks  # ranks are chosen here, from cores in HOSVD form
        cores, projections, ranks, error = tk.hosvd_truncate(
            [e.layer.core.data for e in moved],
            tol=0.0 if whole else tol,
            modes=[tuple(e.layer.modes) for e in moved],
            min_rank=most if whole else [tuple(min(o.min_rank, m) for m in own) for own in most],
            max_rank=most,
            tolerance_mode=o.tolerance_mode,
        )
        finite.append(error.isfinite().all())
        P = [[None if p is None else p[:, :r] for p, r in zip(Ps, e.core.shape)] for e, Ps in zip(moved, projections)]
        if whole or o.min_rank > 1:
            ranks = [self._ranks(*each) for each in zip(moved, cores, tol, ranks)]
            cut = [_cut(*each) for each in zip(moved, cores, P, ranks)]
            cores, P = [core for core, _ in cut], [own for _, own in cut]
        bases = rotated_bases(list(zip(moved, P)))
        moves = [(e, core.shape, *each) for e, core, *each in zip(moved, cores, P, bases)]
        for (e, *_, factors), core, rank, state in zip(moves, cores, ranks, carried_states(moves, o.state)):
            new.append((e, core[corner(e.core.shape)], factors, state, rank[: core.ndim]))
        return new

    def _ranks(self, e, core, tol, found):
        """The ranks to keep of a core in HOSVD form, on the device; found: what the truncation chose, bounds included.

        The same as `RankChoice` without a budget where `rank_multiple` is given.
        """
        o, ranks = self._optimizer, []
        for i, n in enumerate(e.core.shape):
            if i not in e.layer.modes:
                ranks.append(found[i])
                continue
            squares = torch.linalg.vector_norm(core.double().movedim(i, 0).flatten(1), dim=1)[:n] ** 2
            tails = squares.flip(0).cumsum(0).flip(0)  # tails[k]: what rank k would lose
            rank = found[i]
            if not o.adapts_ranks:
                rank = _in_use(e.factors[i]).sum()
            elif o.rank_multiple > 1:
                share = 1 if o.tolerance_mode == "per_mode" else len(e.layer.modes)
                wanted = (tails > tol**2 / share * tails[0]).sum().clamp(min=o.min_rank)
                rank = (wanted + o.rank_multiple - 1) // o.rank_multiple * o.rank_multiple
            known = (tails > _least_tol(e.core) ** 2 * tails[0]).sum()
            ranks.append(torch.minimum(rank, known).clamp(min=1))
        return _feasible(torch.stack(ranks), e.layer.modes)

    def _leave(self, e, ok, core, factors, state, rank=None):
        """Writes the new point over the old one, in its memory."""
        if rank is not None:
            before = self.ranks.get(e.name)
            if before is None:
                columns = zip(e.factors, e.core.shape)
                before = [torch.full_like(rank[0], n) if f is None else _in_use(f).sum() for f, n in columns]
                before = torch.stack(before)
            self.ranks[e.name] = _select(ok, rank, before)
        kept = {}
        for key, value in state.items():
            before = e.state.get(key)
            if isinstance(value, list):
                befores = before or [None] * len(value)
                kept[key] = [_select(ok, new, old) for new, old in zip(value, befores)]
            else:
                kept[key] = _select(ok, value, before)
        core = torch.where(ok, core, e.core)
        factors = [f if f is None else torch.where(ok, f, old) for f, old in zip(factors, e.factors)]
        e.core.copy_(core)
        for old, factor in zip(e.factors, factors):
            if old is not None:
                old.copy_(factor)
        e.layer.assign(e.core, e.factors)
        self._optimizer.state[e.layer.core] = kept
        e.layer.core.grad = None


def _least_tol(core):
    return _LEAST_TOL * torch.finfo(core.dtype).eps


def _outside(factor):
    """The gradient of a factor, zero where its columns in use leave nothing outside their span."""
    n, capacity = factor.shape
    return factor.grad if capacity < n else factor.grad * ~_in_use(factor).all()


def _in_use(factor):
    """Which columns of a factor are not zero."""
    return (factor != 0).any(0)


def _entries_in_use(e):
    """How many entries of an augmented core belong to columns that are not zero, on its device."""
    columns = [basis for basis in e.bases if basis is not None]
    others = math.prod(n for n, basis in zip(e.shape, e.bases) if basis is None)
    return math.prod((_in_use(basis).sum() for basis in columns), start=others)


def _feasible(ranks, modes):
    """As `layers.base.feasible`, of a tensor: at most one rank is above the product of the others."""
    others = ranks.prod() // ranks
    return torch.stack([torch.minimum(r, p) if i in modes else r for i, (r, p) in enumerate(zip(ranks, others))])


def _cut(e, core, projections, ranks):
    """Core and projections with zeros beyond the ranks."""
    cut = []
    for i, (p, rank) in enumerate(zip(projections, ranks)):
        keep = torch.arange(core.shape[i], device=core.device) < rank
        if p is not None:
            core = core * keep.view([-1 if j == i else 1 for j in range(core.ndim)])
            p = p * keep[: p.shape[1]]
        cut.append(p)
    return core, cut


def _tensors(state):
    return [v for v in (state or {}).values() if isinstance(v, torch.Tensor)]


def _select(ok, new, old, into=None):
    """`new` where the step stands, else `old` (zero if there was none), in the memory of `into` or of `old`."""
    if not isinstance(new, torch.Tensor):
        return new
    chosen = torch.where(ok, new, torch.zeros_like(new) if old is None else old)
    into = old if into is None else into
    return chosen if into is None else into.copy_(chosen)


def compact(optimizer, multiple):
    """Cuts capacities to the active ranks, rounded up to a multiple; reads the ranks, so not while capturing."""
    for name, ranks in optimizer.captured.ranks.items():
        layer = optimizer.layers[name]
        sizes = [min(-(-r // multiple) * multiple, n) for r, n in zip(ranks.tolist(), layer.ranks)]
        sizes = [r if i in layer.modes else n for i, (r, n) in enumerate(zip(sizes, layer.ranks))]
        state = optimizer.state[layer.core]
        for key, value in state.items():
            if isinstance(value, list):
                state[key] = [None if m is None else m[:, :r].clone() for m, r in zip(value, sizes)]
            elif isinstance(value, torch.Tensor) and value.shape == layer.core.shape:
                state[key] = value[corner(sizes)].clone()
        factors = [None if f is None else f.data[:, :r].clone() for f, r in zip(layer.factors, sizes)]
        layer.assign(layer.core.data[corner(sizes)].clone(), factors)
