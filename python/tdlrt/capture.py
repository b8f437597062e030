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

    def pairs(self, layer):
        """[(input, grad_output)] of the calls that were backpropagated through.

        Raises RuntimeError where an input was changed in place after the layer had read it.
        """
        for input, version, _ in self._pairs[layer]:
            if input._version != version:
                raise RuntimeError(
                    "the input of a Tucker layer was modified in place after the layer had read it; make that "
                    "operation out of place, or use integrator='two_pass'"
                )
        return [(input, grad) for input, _, grad in self._pairs[layer]]


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
