"""The default integrator: one forward and one backward pass.

[U|V] contains U, so the weight, and with it every activation and output gradient, is the same at the augmented point.
The augmented core gradient is a contraction of the kept pairs (input, grad_output) with the new bases.
"""

import torch

from tdlrt.expansion import enter, expand
from tdlrt.integrators.agreement import Comparison, settle
from tdlrt.integrators.checks import refuse_nonfinite


def one_pass(optimizer, closure):
    return from_pairs(optimizer, closure, augmented_gradient, keep=False)


def from_pairs(optimizer, closure, contract, keep):
    """Evaluates the closure, if any, once; contract(expansion, contraction) gives the new blocks of ∇_C̃ L.

    keep: whether the pairs are needed afterwards.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    layers = optimizer.layers_with_gradient()
    local = {
        name: [layer.core.grad, *(f if f is None else f.grad for f in layer.factors)] for name, layer in layers.items()
    }
    optimizer.reducer.average_gradients(layers.values())
    expansions, augmented = _contracted(optimizer, layers, local, contract)
    if not keep:
        optimizer.kept.clear()
    optimizer.reducer.average([gradient for _, gradient in augmented])
    for e in expansions:
        e.core_gradient = e.layer.core.grad
    for e, gradient in augmented:
        e.core_gradient = gradient
    refuse_nonfinite(
        [(f"{e.name}.core", e.core_gradient) for e in expansions] + optimizer.dense_gradients(), optimizer.reducer
    )
    for e, _ in augmented:
        optimizer.kept.remember_scale(e)
    enter(expansions, optimizer.state)
    for e in expansions:
        e.layer.core.grad = e.core_gradient
    return loss, expansions


def _contracted(optimizer, layers, local, contract):
    """The expansions of all layers, and [(expansion, ∇_C̃ L of this process)] of those that grew."""
    done = {name: optimizer.kept.contracted(layer) for name, layer in layers.items()}
    left = {name: layer for name, layer in layers.items() if done[name] is None}
    expanded = {e.name: e for e in expand(left, optimizer)}
    expansions = [expanded[name] if done[name] is None else done[name].expansion for name in layers]
    comparisons = []
    for e in expansions:
        if e.grew:
            contraction = done[e.name] or optimizer.kept.pairs(e.name, e.layer)
            comparisons.append(Comparison(e, contract(e, contraction), local[e.name], contraction))
    settle(comparisons, optimizer.reducer)
    changed = []
    for c in comparisons:
        e = c.expansion
        if done[e.name] is not None:  # gradients may have been scaled since the backward pass
            e.momenta = {mode: (before, e.parameters[mode].grad) for mode, (before, _) in e.momenta.items()}
            e.ahead.clear()
            changed += [(f"{e.name}.factors.{mode}", gradient) for mode, (_, gradient) in e.momenta.items()]
    refuse_nonfinite(changed, optimizer.reducer)
    return expansions, [(c.expansion, c.gradient) for c in comparisons]


def augmented_gradient(e, contraction):
    """∇_C̃ L = G ×_i [U_i|V_i]ᵀ, G the weight gradient; its known block, ∇_C L, may be left out."""
    return contraction.augmented_gradient(e)
