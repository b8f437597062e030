"""The standard algorithm, d + 1 gradients: a literal K-step per mode, then the core step. The parity oracle.

For each mode i, Mat_i(C)ᵀ = Q_i S_iᵀ and K_i = U_i S_i; the weight is Ten_i(Q_iᵀ) ×_{j≠i} U_j ×_i K_i, so a layer whose
core is Ten_i(Q_iᵀ) and whose i-th factor is K_i computes the same and gives ∇_{K_i} L. K_i takes a plain gradient step,
and [U_i|K_i] spans the new basis. With fixed ranks the same bases are used and the truncation goes back to the ranks.
"""

import torch

import tucker_kernels as tk
from tdlrt.expansion import Expansion, expand_along
from tdlrt.integrators.checks import core_gradients, refuse_nonfinite
from tdlrt.integrators.replay import Replay
from tdlrt.integrators.two_pass import second_pass


def standard(optimizer, closure):
    evaluate = Replay(optimizer, closure)
    layers = optimizer.layers
    expansions = [Expansion.at(name, layer, optimizer) for name, layer in layers.items()]
    steps, loss = {}, None
    for mode in range(max((len(e.factors) for e in expansions if e.layer.train_bases), default=0)):
        loss = _k_step(mode, expansions, optimizer, evaluate, steps)
    last = evaluate
    if loss is None:  # no layer, or none whose bases are trained: an ordinary step
        loss, last = evaluate(), None
        refuse_nonfinite(core_gradients(expansions) + optimizer.dense_gradients(), optimizer.reducer)
    expand_along(expansions, steps)
    seen = [e for e in expansions if e.layer.core.grad is not None or any((e.name, m) in steps for m in e.layer.modes)]
    second_pass(optimizer, seen, last)
    return loss, seen


def _k_step(mode, expansions, optimizer, evaluate, steps):
    """One evaluation with every layer in K-form of `mode`; adds K_i − λ∇_{K_i} L to `steps`, and puts all back."""
    chosen = [e for e in expansions if mode in e.layer.modes]
    rates = optimizer.learning_rates()
    triangles = {}
    try:
        for e in chosen:
            Q, S = torch.linalg.qr(tk.unfold(e.core, mode).T)
            triangles[e.name] = S
            shape = [Q.shape[1] if i == mode else n for i, n in enumerate(e.core.shape)]
            factors = [f @ S.T if i == mode else f for i, f in enumerate(e.factors)]
            e.layer.assign(tk.fold(Q.T.contiguous(), mode, shape).contiguous(), factors)
        loss = evaluate()
        gradients = {e.name: e.parameters[mode].grad for e in chosen}
        refuse_nonfinite(((f"{name}.factors.{mode}", g) for name, g in gradients.items()), optimizer.reducer)
        for e in chosen:
            if gradients[e.name] is not None:
                gradient = gradients[e.name]
                if e.group is not None:  # momentum is kept for U = K S⁻ᵀ, whose gradient is ∇_K L S
                    S = triangles[e.name]
                    inverse = torch.linalg.pinv(S)
                    gradient = gradient - gradient @ S @ inverse  # what a deficient core's factor cannot hold
                    gradient += e.direction(mode, gradients[e.name] @ S, optimizer) @ inverse
                steps[e.name, mode] = e.parameters[mode].data - rates[e.layer.core] * gradient
    finally:
        for e in chosen:
            e.layer.assign(e.core, e.factors)
    return loss
