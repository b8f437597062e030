"""Chooses the ranks of all layers together, on the host: to tolerances, in buckets, within a budget of the whole model.

Singular values of all layers and modes compete for the budget: while the model costs too much, the direction goes that
carries the smallest share of its layer's ‖C‖² per unit of cost that it takes. (GeoLoRA spends one budget over all
layers likewise, for matrices.)
"""

import heapq
import itertools
from dataclasses import dataclass

import torch

from tdlrt.layers.base import feasible
from tdlrt.summary import layer_multiply_adds, layer_parameters, tucker_layers

COSTS = {"parameters": layer_parameters, "multiply_adds": layer_multiply_adds}


@dataclass
class Spectrum:
    """What one layer may keep: squares[i] are the squared singular values of mode i of its core, descending."""

    layer: torch.nn.Module
    squares: list
    least: list
    most: list
    tol: float


class RankChoice:
    """What `TDLRT` calls budget, budget_of and rank_multiple.

    Raises ValueError for a budget below what the smallest ranks cost.
    """

    def __init__(self, model, multiple, budget, budget_of, min_rank, tolerance_mode):
        self._multiple, self._budget, self._per_mode = multiple, budget, tolerance_mode == "per_mode"
        self._layers, self._cost = tucker_layers(model).values(), COSTS[budget_of]
        tucker = {p for layer in self._layers for p in layer.weight_parameters()}
        dense = sum(p.numel() for p in model.parameters() if p not in tucker)
        self._dense = dense if budget_of == "parameters" else 0
        if budget is not None:
            smallest = [
                feasible(
                    [min(min_rank, n) if i in layer.modes else n for i, n in enumerate(layer.weight_shape)], layer.modes
                )
                for layer in self._layers
            ]
            least = self._dense + sum(self._cost(layer, ranks) for layer, ranks in zip(self._layers, smallest))
            if budget < least:
                raise ValueError(f"budget is {budget}; with min_rank={min_rank} the model has {least} {budget_of}")

    @property
    def adapts_without_tolerance(self):
        return self._budget is not None

    def __call__(self, spectra):
        """One tuple of ranks per layer."""
        chosen = [self._to_tolerance(s) for s in spectra]
        if self._budget is not None:
            competing = {s.layer for s in spectra}
            spent = self._dense + sum(self._cost(x, x.ranks) for x in self._layers if x not in competing)
            self._cut(spectra, chosen, self._budget - spent)
        return [tuple(ranks) for ranks in chosen]

    def _to_tolerance(self, s):
        ranks = list(s.most)
        modes = s.layer.modes
        for i in modes:
            allowed = s.tol**2 * sum(s.squares[i]) / (1 if self._per_mode else len(modes))
            tails = itertools.accumulate(reversed(s.squares[i]))
            dropped = sum(1 for _ in itertools.takewhile(lambda tail, allowed=allowed: tail <= allowed, tails))
            wanted = max(len(s.squares[i]) - dropped, s.least[i])
            ranks[i] = min(-(-wanted // self._multiple) * self._multiple, s.most[i])
        return feasible(ranks, modes)

    def _cut(self, spectra, chosen, budget):
        """Lowers ranks in place, cheapest share of ‖C‖² per cost first, until they cost no more than the budget."""
        costs = [self._cost(s.layer, ranks) for s, ranks in zip(spectra, chosen)]
        total = sum(costs)
        offers = []

        def offer(k):
            best = min(self._reductions(spectra[k], chosen[k], costs[k]), default=None)
            if best is not None:
                heapq.heappush(offers, (best[0], k, best[1]))

        for k in range(len(spectra)):
            offer(k)
        while total > budget and offers:
            _, k, ranks = heapq.heappop(offers)
            total -= costs[k]
            chosen[k], costs[k] = ranks, self._cost(spectra[k].layer, ranks)
            total += costs[k]
            offer(k)

    def _reductions(self, s, ranks, cost):
        """(price, ranks with one mode lowered to the next allowed rank)."""
        for i in s.layer.modes:
            lower = max((ranks[i] - 1) // self._multiple * self._multiple, s.least[i])
            if lower < ranks[i]:
                reduced = feasible([lower if j == i else r for j, r in enumerate(ranks)], s.layer.modes)
                share = sum(s.squares[i][lower : ranks[i]]) / (sum(s.squares[i]) or 1.0)
                saved = cost - self._cost(s.layer, reduced)
                if saved > 0:
                    yield share / saved, reduced


def slice_squares(cores):
    """Per core and mode, the squared norms of its slices: squared singular values, where the core has HOSVD form."""
    norms = [
        torch.linalg.vector_norm(core.double().movedim(i, 0).flatten(1), dim=1)
        for core in cores
        for i in range(core.ndim)
    ]
    values = iter((torch.cat(norms) ** 2).tolist())
    return [[list(itertools.islice(values, n)) for n in core.shape] for core in cores]
