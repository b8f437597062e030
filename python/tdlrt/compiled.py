"""How pairs (input, grad_output) come out of a graph of `torch.compile`, which can hold no hook that keeps tensors.

The output of a layer goes through `Kept`, whose backward pass is one operator: what the compiler sees is a function of
the input and the output gradient that returns the latter. It also hands copies of both to the recorder of the layer;
copies, because the compiler may use the memory of either again.
"""

import itertools
import weakref

import torch

_recorders: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(recorder):
    """A number by which a graph can name this recorder; its `keep(input, grad_output)` is called in backward passes."""
    found = next(_numbers)
    _recorders[found] = recorder
    return found


@torch.library.custom_op("tdlrt::keep_pair", mutates_args=())
def keep_pair(input: torch.Tensor, grad_output: torch.Tensor, recorder: int) -> torch.Tensor:
    """A copy of grad_output; the pair is given to the recorder of this number, if it is still there."""
    found = _recorders.get(recorder)
    if found is not None:
        found.keep(input.clone(), grad_output.clone())
    return grad_output.clone()


@keep_pair.register_fake
def _(input, grad_output, recorder):
    return grad_output.clone()


class Kept(torch.autograd.Function):
    """A copy of the output; the backward pass keeps its gradient and the layer's input."""

    @staticmethod
    def forward(ctx, output, input, recorder):
        ctx.save_for_backward(input)
        ctx.recorder = recorder
        return output.clone()  # of a view nothing could be changed in place, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return keep_pair(input, grad, ctx.recorder), None, None
