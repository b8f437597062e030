"""Keeps, for every call of a Tucker layer, its input and the gradient of its output.

The one-pass step contracts these pairs with the new bases instead of running the network a second time. A layer called
several times, or over several micro-batches, contributes one pair per call, and the contributions add up.

Pairs are kept until the optimiser steps ("deferred"), which orthogonalises all layers in one call; or a layer's are
contracted inside the backward pass as soon as its factors have their gradients, and freed ("inline").

Pairs count once the core has accumulated a gradient in the same backward pass: `torch.autograd.grad` (an adversarial
example, a saliency map) leaves none. They are forgotten with that gradient, whoever sets it to None.
"""

import weakref

import torch

from tdlrt import compiled
from tdlrt.expansion import NonFiniteError, expand

RETAIN = ("deferred", "inline")
SCALE = "gradient_scale"  # in the state of a core, see `remember_scale`


class KeptPairs:
    """What is kept of each layer since `clear()`; lives as long as the optimiser that owns it.

    layers: {name: layer}.
    """

    def __init__(self, layers, optimizer, inline=False):
        # Of each call (input, its version, grad_output, projections), and its backward pass until the core accumulates.
        self._pairs = {layer: [] for layer in layers.values()}
        self._pending = {layer: [] for layer in layers.values()}
        # Inline only: {layer: Contracted}, and {layer: (backward pass, parameters whose gradients are still to come)}.
        self._contracted = {}
        self._missing = {}
        self._inline = inline
        own = weakref.ref(self)
        self._optimizer = weakref.ref(optimizer)
        for name, layer in layers.items():
            layer.register_forward_hook(_Recorder(own, layer, optimizer.captured is not None))
            _watch(layer, own)
            if inline:
                for parameter in _trained(layer):
                    parameter.register_post_accumulate_grad_hook(_Arrival(own, name, layer))

    def clear(self):
        for layer in self._pairs:
            self._forget(layer)
            self._pending[layer].clear()
        self._missing.clear()

    def _forget(self, layer):
        """Drops what counted: the gradient it belongs to is gone."""
        self._contracted.pop(layer, None)
        self._pairs[layer].clear()

    def _keep(self, layer, input, version, grad_output, *projected):
        self._pending[layer].append((_backward_pass(), (input, version, grad_output.detach(), projected)))

    def _accumulated(self, layer):
        """The core has the gradient of this backward pass, so its pairs count."""
        now, pending = _backward_pass(), self._pending[layer]
        self._pairs[layer] += [pair for own, pair in pending if own == now]
        self._pending[layer] = [(own, pair) for own, pair in pending if own != now]

    def _arrived(self, name, layer, parameter):
        """Contracts the layer's pairs once every parameter of its weight has its gradient."""
        if not self.calls(layer):
            return
        now = _backward_pass()
        own, missing = self._missing.get(layer, (None, None))
        if own != now:
            missing = set(_trained(layer))
            self._missing[layer] = now, missing
        missing.discard(parameter)
        if not missing:
            del self._missing[layer]
            self._contract(name, layer)

    def _contract(self, name, layer):
        if layer in self._contracted:
            raise RuntimeError(
                f"{name} was backpropagated through a second time before the step; retain='inline' contracts and frees "
                "what one backward pass gives, and new bases need the sum of all: use retain='deferred' to accumulate "
                "gradients"
            )
        with torch.no_grad():
            try:
                optimizer = self._optimizer()
                scale = optimizer.state.get(layer.core, {}).get(SCALE, 1.0)
                (expansion,) = expand({name: layer}, optimizer, scale)
            except NonFiniteError:  # found again by the step, which says so or skips
                return
            if expansion.grew:
                self._contracted[layer] = Contracted(expansion, self.pairs(name, layer))
                self._pairs[layer].clear()

    def calls(self, layer):
        """How many calls of the layer are kept."""
        return len(self._pairs[layer]) + len(self._pending[layer])

    def remember_scale(self, e):
        """What gradients were multiplied by after the last backward pass, likely to be so again (loss scaling): a new
        direction adds them to a momentum of the scale after. In the state of the core, for a run that goes on."""
        if self._inline and e.group is not None:
            state = self._optimizer().state[e.layer.core]
            state.pop(SCALE, None)
            if abs(e.scale - 1) >= 1e-3:  # less is rounding
                state[SCALE] = e.scale

    def contracted(self, layer):
        """The `Contracted` of a layer that the backward pass has dealt with, or None."""
        return self._contracted.get(layer)

    def pairs(self, name, layer):
        """The layer's calls that were backpropagated through, as `Pairs`.

        Raises RuntimeError where there are none, or an input was changed in place after the layer had read it.
        """
        kept = self._pairs[layer]
        if not kept:
            raise RuntimeError(
                f"{name} has gradients, but none of its calls was seen: it was called or compiled before the "
                "optimiser was made, or replicated, or its weight was read without calling it; leave it dense "
                "(tuckerize(skip=…)) or use integrator='two_pass' there"
            )
        if any(input._version != version for input, version, *_ in kept):
            raise RuntimeError(
                f"the input of {name} was modified in place after the layer had read it; make that operation out of "
                "place, or use integrator='two_pass'"
            )
        return Pairs(layer, [(input, *rest) for input, _, *rest in kept])


class Pairs:
    """(input, grad_output, projections) of each call of one layer; the last may be ()."""

    def __init__(self, layer, pairs):
        self._layer, self._pairs = layer, pairs

    def core_gradient(self, bases, known=None):
        """∇_C L for a core in the given bases, G ×_i basis_iᵀ with the weight gradients G of all calls.

        known: sizes of a leading block whose gradient the caller has; it may be left zero.
        """
        (x, dy, projected), *others = self._pairs
        total = self._layer.core_gradient(x, dy, bases, known, *projected)
        for x, dy, projected in others:
            total += self._layer.core_gradient(x, dy, bases, known, *projected)
        return total

    def augmented_gradient(self, e):
        """∇_C̃ L in the bases [U|V]; its known block, ∇_C L, may be left out."""
        return self.core_gradient(e.bases, e.core.shape)

    def old_gradient(self, e):
        """∇_C L as the pairs give it."""
        return self.core_gradient(e.factors)

    @property
    def half(self):
        """Whether gradients came from half-precision arithmetic."""
        return any(dy.dtype in (torch.bfloat16, torch.float16) for _, dy, _ in self._pairs)

    def rounding(self):
        """Bound on the rounding error of a weight gradient, ε Σ ‖x‖ ‖dy‖."""
        eps = max(torch.finfo(dy.dtype).eps for _, dy, _ in self._pairs)
        return eps * sum(self._layer.input_norm(x) * torch.linalg.vector_norm(dy) for x, dy, _ in self._pairs)


class Contracted:
    """What `Pairs` would give, computed from them when the backward pass had just ended in this layer."""

    def __init__(self, expansion, pairs):
        self.expansion, self.half = expansion, pairs.half
        self._augmented, self._rounding = pairs.augmented_gradient(expansion), pairs.rounding()
        self._old = expansion.layer.core.grad.clone()  # nothing can have scaled it yet

    def augmented_gradient(self, e):
        return self._augmented

    def old_gradient(self, e):
        return self._old

    def rounding(self):
        return self._rounding


def _trained(layer):
    """The parameters of the layer's weight that get gradients."""
    return [p for p in (layer.core, *layer.factors) if p is not None and p.requires_grad]


def _can_grow(layer, at_capacity):
    """Whether a step may turn bases out of their span; of a square factor at fixed capacity columns may be unused."""
    return layer.train_bases and any(
        f is not None and f.requires_grad and (at_capacity or f.shape[1] < f.shape[0]) for f in layer.factors
    )


def _backward_pass():
    """A number of the backward pass that is running."""
    return torch._C._current_graph_task_id()


def _watch(layer, kept):
    """Tells the kept pairs when the core is about to accumulate a first gradient, and when it has accumulated one."""
    core, layer = layer.core, weakref.ref(layer)

    def before(gradient):
        if kept() is not None and layer().core.grad is None:
            kept()._forget(layer())

    def after(core):
        if kept() is not None:
            kept()._accumulated(layer())

    trained = core.requires_grad
    core.requires_grad_()  # a frozen core, which may be trained later, would refuse hooks
    core.register_hook(before)
    core.register_post_accumulate_grad_hook(after)
    core.requires_grad_(trained)


class _Arrival:
    """Hook of a parameter whose gradient is there."""

    def __init__(self, kept, name, layer):
        self._kept, self._name, self._layer = kept, name, weakref.ref(layer)

    def __call__(self, parameter):
        kept, layer = self._kept(), self._layer()
        if kept is not None and layer is not None:
            kept._arrived(self._name, layer, parameter)


class _Recorder:
    """Forward hook. A copy or pickle of the model carries an inert one, since its optimiser does not come along."""

    def __init__(self, kept=None, layer=None, at_capacity=False):
        self._kept, self._layer = kept, None if layer is None else weakref.ref(layer)
        self._at_capacity = at_capacity
        self._number = None if kept is None else compiled.number(self)

    def __call__(self, layer, args, output):
        if self._number is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        if not _can_grow(layer, self._at_capacity):
            return None
        if torch.compiler.is_compiling():
            return compiled.Kept.apply(output, args[0].detach(), self._number)
        kept = self._kept()
        if kept is not None:
            input, version = args[0].detach(), args[0]._version

            def keep(grad_output, *projected):
                kept._keep(layer, input, version, grad_output, *projected)

            node = layer.projecting(output)
            if node is None:
                output.register_hook(keep)
            else:
                node.receivers.append(keep)
        return None

    def keep(self, input, grad_output):
        """What `compiled.Kept` calls in the backward pass."""
        kept, layer = self._kept(), self._layer()
        if kept is not None and layer is not None:
            kept._keep(layer, input, input._version, grad_output)

    def __deepcopy__(self, memo):
        return _Recorder()

    def __reduce__(self):
        return _Recorder, ()


def drop_recorders(layer):
    """Removes the hooks of this module from a layer; the user's stay."""
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(hook, _Recorder):
            del layer._forward_hooks[key]
