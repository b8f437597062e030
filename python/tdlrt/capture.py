"""Keeps, for every call of a Tucker layer, its input and the gradient of its output, until the optimiser steps.

The one-pass step contracts these pairs with the new bases instead of running the network a second time. A layer called
several times, or over several micro-batches, contributes one pair per call, and the contributions add up.
"""

import weakref

import torch


class Capture:
    """The pairs of each layer since `clear()`; lives as long as the optimiser that owns it."""

    def __init__(self, layers):
        self._pairs = {layer: [] for layer in layers}
        for layer in layers:
            layer.register_forward_hook(_Recorder(weakref.ref(self)), always_call=False)

    def clear(self):
        for pairs in self._pairs.values():
            pairs.clear()

    def _keep(self, layer, input, version, grad_output):
        self._pairs[layer].append((input, version, grad_output.detach()))

    def kept(self, layer):
        """How many calls of the layer have been kept."""
        return len(self._pairs[layer])

    def pairs(self, name, layer):
        """The layer's calls that were backpropagated through, as `Pairs`.

        Raises RuntimeError where there are none, or an input was changed in place after the layer had read it.
        """
        kept = self._pairs[layer]
        if not kept:
            raise RuntimeError(
                f"{name} has gradients, but none of its calls was seen: it was called before the optimiser was made, "
                "or compiled or replicated; use integrator='two_pass' there"
            )
        if any(input._version != version for input, version, _ in kept):
            raise RuntimeError(
                f"the input of {name} was modified in place after the layer had read it; make that operation out of "
                "place, or use integrator='two_pass'"
            )
        return Pairs(layer, [(input, grad) for input, _, grad in kept])


class Pairs:
    """(input, grad_output) of each call of one layer."""

    def __init__(self, layer, pairs):
        self._layer, self._pairs = layer, pairs

    def core_gradient(self, bases, known=None):
        """∇_C L for a core in the given bases, G ×_i basis_iᵀ with the weight gradients G of all calls.

        known: sizes of a leading block whose gradient the caller has; it may be left zero.
        """
        (x, dy), *others = self._pairs
        total = self._layer.core_gradient(x, dy, bases, known)
        for x, dy in others:
            total += self._layer.core_gradient(x, dy, bases, known)
        return total

    @property
    def half(self):
        """Whether gradients came from half-precision arithmetic."""
        return any(dy.dtype in (torch.bfloat16, torch.float16) for _, dy in self._pairs)

    def rounding(self):
        """Bound on the rounding error of a weight gradient, ε Σ ‖x‖ ‖dy‖."""
        eps = max(torch.finfo(dy.dtype).eps for _, dy in self._pairs)
        return eps * sum(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(dy) for x, dy in self._pairs)


class _Recorder:
    """Forward hook. A copy or pickle of the model carries an inert one, since its optimiser does not come along."""

    def __init__(self, capture=None):
        self._capture = capture

    def __call__(self, layer, args, output):
        capture = self._capture and self._capture()
        if capture is None or not layer.train_bases or not torch.is_grad_enabled() or not output.requires_grad:
            return
        input, version = args[0].detach(), args[0]._version
        output.register_hook(lambda grad: capture._keep(layer, input, version, grad))

    def __deepcopy__(self, memo):
        return _Recorder()

    def __reduce__(self):
        return _Recorder, ()
