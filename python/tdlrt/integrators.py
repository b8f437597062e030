"""The integrators: how the gradient of the augmented core is obtained. Each leaves every layer at its augmented point
with that gradient in `core.grad`, or changes nothing and raises.

All start from `δU = ∇_U L` of one ordinary backward pass, which spans the augmented bases [U|V] (see `expansion.py`).
"""

import torch

from tdlrt.expansion import NonFiniteError, expand

# Largest ‖∇_C L − c H‖ / ‖∇_C L‖ taken for rounding, H being the same block from the kept pairs.
_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}


def one_pass(optimizer, closure):
    """The default: one forward and one backward pass.

    [U|V] contains U, so the weight, and with it every activation and output gradient, is the same at the augmented
    point; the augmented core gradient is a contraction of the kept pairs (input, grad_output) with the new bases.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    layers = optimizer.layers_with_gradient()
    expansions = expand(layers)
    gradients, agreements = [], []
    for e in expansions:
        gradient, agreement = _augmented_gradient(e, optimizer.capture.pairs(e.layer))
        gradients.append(gradient)
        agreements.append(agreement)
    _refuse_disagreement(expansions, agreements)
    _refuse_nonfinite(optimizer, zip((e.name for e in expansions), gradients))
    for e, gradient in zip(expansions, gradients):
        e.enter(optimizer.state)
        e.layer.core.grad = gradient
    return loss, expansions


def _augmented_gradient(e, pairs):
    """Σ over the calls of the contraction, with the block that autograd knows already taken from it.

    What happened to `core.grad` since the backward pass (unscaling, clipping) multiplied it by some c; the new blocks
    are multiplied by the same c.
    """
    known = e.layer.core.grad
    if e.shape == tuple(e.core.shape):
        return known, None
    if not pairs:
        raise RuntimeError(
            f"{e.name} has gradients, but none of its calls was seen: it was called before the optimiser was made, or "
            "compiled or replicated; use integrator='two_pass' there"
        )
    total = sum(e.layer.core_gradient(x, dy, e.bases) for x, dy in pairs)
    block = tuple(slice(0, n) for n in e.core.shape)
    H = total[block]
    square = torch.linalg.vector_norm(H) ** 2
    scale = torch.where(square > 0, (known * H).sum() / square, 1.0)
    size = torch.linalg.vector_norm(known)
    difference = torch.linalg.vector_norm(known - scale * H) / torch.where(size > 0, size, 1.0)
    total = total * scale
    total[block] = known
    low = any(dy.dtype in (torch.bfloat16, torch.float16) for _, dy in pairs)
    return total, difference / (0.2 if low else _AGREEMENT[known.dtype])


def _refuse_disagreement(expansions, agreements):
    checked = [(e, a) for e, a in zip(expansions, agreements) if a is not None]
    if not checked:
        return
    worst = torch.stack([a.double() for _, a in checked]).tolist()
    for (e, _), a in zip(checked, worst):
        if a > 1:  # NaN is left to the finiteness check, which names it
            raise RuntimeError(
                f"the gradient of {e.name}.core is not a multiple of what its inputs and output gradients give. The "
                "loss may use the weight outside the layer (a penalty), or the gradient was changed by more than a "
                "scaling; use integrator='two_pass'"
            )


def _refuse_nonfinite(optimizer, core_gradients):
    named = [(name + ".core", g) for name, g in core_gradients]
    named += optimizer.dense_gradients()
    if not named:
        return
    finite = torch.stack([torch.isfinite(g).all() for _, g in named]).tolist()
    bad = [name for (name, _), ok in zip(named, finite) if not ok]
    if bad:
        raise NonFiniteError(f"the gradient of {', '.join(bad)} holds NaN or Inf")


def two_pass(optimizer, closure):
    """The efficient algorithm of the paper, and the oracle for one-pass: a second pass at the augmented point.

    The closure computes the loss and its gradients. Buffers (batch-norm statistics) and random states are put back
    before the second pass, so that it repeats the first.
    """
    if closure is None:
        raise ValueError("closure is None; integrator='two_pass' evaluates the loss twice and needs it")
    buffers = [(b, b.clone()) for b in optimizer.model.buffers()]
    random = _random_states(optimizer.model)
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = closure()
    expansions = expand(optimizer.layers_with_gradient())
    _refuse_nonfinite(optimizer, ((e.name, e.layer.core.grad) for e in expansions))
    for buffer, before in buffers:
        buffer.copy_(before)
    _restore_random_states(random)
    for e in expansions:
        e.enter(optimizer.state)
    try:
        optimizer.zero_grad()
        with torch.enable_grad():
            closure()
        _refuse_nonfinite(optimizer, ((e.name, e.layer.core.grad) for e in expansions))
    except BaseException:
        for e in expansions:
            e.leave(optimizer.state)
        raise
    return loss, expansions


def _random_states(model):
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    return torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}


def _restore_random_states(states):
    cpu, cuda = states
    torch.set_rng_state(cpu)
    for device, state in cuda.items():
        torch.cuda.set_rng_state(state, device)


INTEGRATORS = {"one_pass": one_pass, "two_pass": two_pass}
