"""Grouped convolutions: one Tucker weight per group."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.layers.base import copied
from tdlrt.layers.conv import TuckerConv1d, TuckerConv2d, TuckerConv3d

_TUCKER_CLASS: dict[type[nn.Module], Any] = {nn.Conv1d: TuckerConv1d, nn.Conv2d: TuckerConv2d, nn.Conv3d: TuckerConv3d}


class TuckerGroupedConv(nn.Module):
    """A convolution whose groups are Tucker convolutions of their own, each with its ranks.

    It computes what `nn.Conv*` with `groups` does: group k maps the k-th part of the input channels to the k-th part of
    the output channels. Every group is a call of the operator, so it suits a few wide groups.

    Attributes:
        groups: `ModuleList` of `TuckerConv1d/2d/3d`, alike but for their ranks. Others are refused (ValueError).
    """

    groups: Any  # torch does not type what a ModuleList holds

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        listed: list[Any] = (
            list(layers) if isinstance(layers, Iterable) and not isinstance(layers, Tensor) else [layers]
        )
        if not all(isinstance(layer, tuple(_TUCKER_CLASS.values())) for layer in listed):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in listed}))
            raise TypeError(f"layers must be TuckerConv1d, TuckerConv2d or TuckerConv3d, one per group; got {kinds}")
        if len({_alike(layer) for layer in listed}) != 1:
            raise ValueError(f"layers has {len(listed)} layers; allowed are one or more of one shape and geometry")
        self.groups = nn.ModuleList(listed)

    @property
    def weight(self) -> Tensor:
        """The dense weight (C_out, C_in / groups, *window), reconstructed."""
        return torch.cat([layer.weight for layer in self.groups])

    @property
    def dense_shape(self):
        n_out, *others = self.groups[0].dense_shape
        return (len(self.groups) * n_out, *others)

    def double_weight(self) -> Tensor:
        """`weight` computed in float64 whatever the layer's dtype."""
        return torch.cat([layer.double_weight() for layer in self.groups])

    @property
    def bias(self) -> Tensor | None:
        """(C_out,), or None."""
        return None if self.groups[0].bias is None else torch.cat([layer.bias for layer in self.groups])

    def forward(self, input: Tensor) -> Tensor:
        first, channels = self.groups[0], -1 - self.groups[0].dimensions
        count = len(self.groups) * first.weight_shape[1]
        if input.ndim < -channels or input.shape[channels] != count:
            raise ValueError(f"input has shape {tuple(input.shape)}; its dimension {channels} must be {count}")
        parts = input.chunk(len(self.groups), channels)
        return torch.cat([layer(part) for layer, part in zip(self.groups, parts)], channels)

    @classmethod
    def like(cls, layer, ranks, modes, bias, dtype):
        """Fresh groups with the shape and geometry of a grouped `nn.Conv*`, on its device."""
        tucker = _TUCKER_CLASS[type(layer)]
        return cls(tucker.like(part, ranks, modes, bias, dtype) for part in _parts(layer))

    @classmethod
    def from_dense(cls, layer: nn.Module, **how: Any) -> "TuckerGroupedConv":
        """One Tucker layer per group of an `nn.Conv1d/2d/3d`; `how` as in their `from_dense`, for each group."""
        if type(layer) not in _TUCKER_CLASS:
            raise TypeError(f"layer must be a Conv1d, Conv2d or Conv3d, got {type(layer).__name__}")
        return cls(_TUCKER_CLASS[type(layer)].from_dense(part, **how) for part in _parts(layer)).train(layer.training)

    def to_dense(self) -> nn.Module:
        """The grouped `nn.Conv*` with the reconstructed weight."""
        return _joined([layer.to_dense() for layer in self.groups]).train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The same map as plain grouped layers; groups of smaller rank are filled up with zeros."""
        chains = [list(layer.to_sequential()) for layer in self.groups]
        return nn.Sequential(*(_joined(links) for links in zip(*chains))).train(self.training)


def _alike(layer):
    """What the groups of one convolution have in common."""
    geometry = layer.weight_shape, layer.stride, layer.padding, layer.dilation, layer.padding_mode
    return type(layer), layer.modes, layer.bias is None, *geometry


def _parts(layer):
    """Each group of a dense convolution as a layer of its own."""
    weights = layer.weight.chunk(layer.groups)
    biases = [None] * layer.groups if layer.bias is None else layer.bias.chunk(layer.groups)
    for weight, bias in zip(weights, biases):
        part = _conv_like(layer, weight.shape[1], weight.shape[0], 1, bias is not None)
        part.requires_grad_(layer.weight.requires_grad).train(layer.training)
        yield copied(part, weight, bias)


def _joined(layers):
    """One grouped convolution that does what the layers do side by side; channels are the most any of them has."""
    count, first = len(layers), layers[0]
    n_out, n_in = (max(layer.weight.shape[i] for layer in layers) for i in (0, 1))
    whole = _conv_like(first, n_in * count, n_out * count, count, first.bias is not None)
    weight = whole.weight.new_zeros(count, n_out, n_in, *first.kernel_size)
    for own, layer in zip(weight, layers):
        own[: layer.weight.shape[0], : layer.weight.shape[1]] = layer.weight.detach()
    bias = None if first.bias is None else torch.cat([layer.bias.detach() for layer in layers])
    return copied(whole, weight.flatten(0, 1), bias)


def _conv_like(layer, n_in, n_out, groups, bias):
    return type(layer)(
        *(n_in, n_out, layer.kernel_size, layer.stride, layer.padding, layer.dilation),
        groups=groups,
        bias=bias,
        padding_mode=layer.padding_mode,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
