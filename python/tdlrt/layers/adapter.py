"""A frozen dense layer plus a Tucker weight that is trained."""

import torch
from torch import Tensor, nn

from tdlrt.layers.base import TuckerLayer, autocast_dtype
from tdlrt.layers.grouped import TuckerGroupedConv


class TuckerAdapter(nn.Module):
    """`base(x) + delta(x)`: the dense layer as it was, and a Tucker layer of its geometry without a bias.

    The core of `delta` starts at zero, so at first the layer computes exactly what `base` computes. A half-precision
    base keeps its dtype; `delta` is float32 beside it.

    Raises TypeError for layers of other kinds and ValueError for a delta of another shape or with a bias.

    Attributes:
        base: the dense layer, frozen.
        delta: the Tucker layer (or its groups), which `TDLRT` trains like any other.
    """

    base: nn.Linear | nn.modules.conv._ConvNd
    delta: TuckerLayer | TuckerGroupedConv

    def __init__(self, base: nn.Linear | nn.modules.conv._ConvNd, delta: TuckerLayer | TuckerGroupedConv) -> None:
        super().__init__()
        if not isinstance(base, (nn.Linear, nn.modules.conv._ConvNd)):
            raise TypeError(f"base must be a linear layer or a convolution, got {type(base).__name__}")
        if not isinstance(delta, (TuckerLayer, TuckerGroupedConv)):
            raise TypeError(f"delta must be a Tucker layer, got {type(delta).__name__}")
        shape = delta.dense_shape
        if shape != tuple(base.weight.shape) or delta.bias is not None:
            raise ValueError(
                f"delta has shape {shape} and bias={delta.bias is not None}; allowed is {tuple(base.weight.shape)} "
                "without a bias"
            )
        self.base, self.delta = base, delta

    @property
    def weight(self) -> Tensor:
        """The dense weight W0 + Tucker, in the dtype of W0; differentiable."""
        return self.base.weight + self.delta.weight.to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        y = self.base(input)
        if autocast_dtype(input) is None:
            input = input.to(next(self.delta.parameters()).dtype)
        return y + self.delta(input).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the Tucker weight to that of `base`, which is returned; one rounding of the exact sum."""
        weight = self.base.weight
        weight.copy_(weight.double() + self.delta.double_weight())
        return self.base
