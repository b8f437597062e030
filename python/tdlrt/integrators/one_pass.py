"""The default integrator: one forward and one backward pass.

[U|V] contains U, so the weight, and with it every activation and output gradient, is the same at the augmented point.
The augmented core gradient is a contraction of the kept pairs (input, grad_output) with the new bases.
"""

import torch

from tdlrt.expansion import expand
from tdlrt.integrators.agreement import compare, refuse_disagreement
from tdlrt.integrators.checks import refuse_nonfinite


def one_pass(optimizer, closure):
    return from_pairs(optimizer, closure, augmented_gradient)


def from_pairs(optimizer, closure, contract):
    """Evaluates the closure, if any, once; contract(expansion, pairs) gives ∇_C̃ L up to a common factor."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    layers = optimizer.layers_with_gradient()
    local = {
        name: [layer.core.grad, *(f if f is None else f.grad for f in layer.factors)] for name, layer in layers.items()
    }
    optimizer.reducer.average_gradients(layers.values())
    expansions = expand(layers)
    comparisons = []
    for e in expansions:
        if e.grew:
            pairs = kept_pairs(e, optimizer.capture)
            comparisons.append(compare(e, contract(e, pairs), local[e.name], pairs))
    refuse_disagreement(comparisons, optimizer.reducer)
    optimizer.reducer.average([c.gradient for c in comparisons])
    for e in expansions:
        e.core_gradient = e.layer.core.grad
    for c in comparisons:
        c.gradient[c.expansion.known_block] = c.expansion.core_gradient
        c.expansion.core_gradient = c.gradient
    refuse_nonfinite([(f"{e.name}.core", e.core_gradient) for e in expansions] + optimizer.dense_gradients())
    for e in expansions:
        e.enter(optimizer.state)
        e.layer.core.grad = e.core_gradient
    return loss, expansions


def kept_pairs(e, capture):
    pairs = capture.pairs(e.layer)
    if not pairs:
        raise RuntimeError(
            f"{e.name} has gradients, but none of its calls was seen: it was called before the optimiser was made, or "
            "compiled or replicated; use integrator='two_pass' there"
        )
    return pairs


def augmented_gradient(e, pairs):
    """∇_C̃ L = Σ over the calls of G ×_i [U_i|V_i]ᵀ, G the weight gradient of the call."""
    return sum(e.layer.core_gradient(x, dy, e.bases) for x, dy in pairs)
