"""The linear layer with a Tucker weight."""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

import tucker_kernels as tk
from tdlrt.layers.base import Device, DType, Modes, Ranks, TuckerLayer, copied, filled, is_integer
from tucker_kernels import cost_model
from tucker_kernels.linear import new_blocks
from tucker_kernels.validation import shown


class TuckerLinear(TuckerLayer):
    """Linear layer whose weight, seen as (*out_modes, *in_modes), is Tucker; two modes are U C Vᵀ.

    in_features, out_features: an integer, or a tuple of mode sizes whose product is the number of features.
    ranks: a fraction, an integer cap, a tuple, or None (full). Every mode carries a factor unless `modes` names fewer.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        bias: bool = True,
        ranks: Ranks = None,
        modes: Modes = "all",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        in_modes, out_modes = _mode_sizes("in_features", in_features), _mode_sizes("out_features", out_features)
        self.out_modes = len(out_modes)
        super().__init__((*out_modes, *in_modes), ranks, _linear_modes(modes), bias, device, dtype)
        self.in_features, self.out_features = math.prod(in_modes), math.prod(out_modes)
        self.reset_parameters()

    def out_features_of(self, shape):
        return math.prod(shape[: self.out_modes])

    @property
    def dense_shape(self):
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        x, core, bias, factors = self._operands(input)
        return tk.tucker_linear(x, core, factors, bias, self.out_modes, path=self.path)

    def projecting(self, output):
        node = output.grad_fn
        if not hasattr(node, "receivers") or len(self.modes) != 2 or len(self.weight_shape) != 2:
            return None
        rows = output.numel() // self.out_features
        return node if cost_model.keep_projections(rows, self.weight_shape, self.ranks) else None

    def core_gradient(self, input, grad_output, factors, known=None, *projected):
        """Gradient of the loss with respect to a core in the given bases, from one call's input and output gradient.

        Both lie in the layer's own shapes. With augmented bases it is the augmented core gradient.
        known: sizes of a leading block whose gradient the caller has; it may be left zero.
        projected: received from the node of `projecting`, grad_output and input in the bases of that block.
        """
        if projected and known:
            return new_blocks(input, grad_output, factors, projected)
        x, grad_output = input.to(self.core.dtype), grad_output.to(self.core.dtype)
        return tk.tucker_linear_core_grad(x, grad_output, factors, self.weight_shape, self.out_modes)

    @classmethod
    def like(cls, layer, ranks, modes, bias, dtype, in_modes=None, out_modes=None):
        """A fresh Tucker layer with the features of an `nn.Linear`, on its device."""
        sizes = in_modes or layer.in_features, out_modes or layer.out_features
        return cls(*sizes, bias=bias, ranks=ranks, modes=modes, device=layer.weight.device, dtype=dtype)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Linear,
        ranks: Ranks = None,
        tol: float | None = None,
        modes: Modes = "all",
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        method: Literal["hosvd", "hooi"] = "hosvd",
    ) -> "TuckerLinear":
        """The Tucker layer nearest to an `nn.Linear` by truncated HOSVD, at `ranks` or to the relative tolerance `tol`.

        in_modes, out_modes: mode sizes to fold the features into; default one mode on each side.
        method: "hooi" goes on to the nearest weight of the ranks found, which for two modes HOSVD gives already.
        """
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer must be a Linear, got {type(layer).__name__}")
        features = layer.in_features, layer.out_features
        sizes_in = _mode_sizes("in_modes", features[0] if in_modes is None else in_modes, features[0])
        sizes_out = _mode_sizes("out_modes", features[1] if out_modes is None else out_modes, features[1])
        modes = _linear_modes(modes)
        core, factors = cls._truncated(layer.weight.reshape(*sizes_out, *sizes_in), ranks, tol, modes, method)
        new = cls.like(layer, tuple(core.shape), modes, layer.bias is not None, layer.weight.dtype, sizes_in, sizes_out)
        return filled(new, layer, core, factors)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` with the reconstructed weight."""
        dense = nn.Linear(
            *(self.in_features, self.out_features),
            bias=self.bias is not None,
            device=self.core.device,
            dtype=self.core.dtype,
        )
        return copied(dense, self.weight, self.bias).train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The same map as plain layers: project, core, expand; one dense layer for more than two modes."""
        if len(self.weight_shape) > 2:
            return nn.Sequential(self.to_dense())
        left, right = self.factors
        matrices = [None if right is None else right.T, self.core, left]
        matrices = [m for m in matrices if m is not None]
        layers = []
        for i, matrix in enumerate(matrices):
            bias = self.bias if i == len(matrices) - 1 else None
            n_out, n_in = matrix.shape
            layer = nn.Linear(n_in, n_out, bias=bias is not None, device=matrix.device, dtype=matrix.dtype)
            layers.append(copied(layer, matrix, bias))
        return nn.Sequential(*layers).train(self.training)


def _linear_modes(modes):
    # A linear layer has no window: "channels" and "all" mean the same.
    return "all" if isinstance(modes, str) and modes == "channels" else modes


def _mode_sizes(name, value, product=None):
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not sizes or not all(is_integer(n) and n >= 1 for n in sizes):
        kind = ValueError if all(map(is_integer, sizes)) else TypeError
        raise kind(f"{name} is {shown(value)}; allowed are a positive integer or a tuple of them")
    sizes = tuple(int(n) for n in sizes)
    if product is not None and math.prod(sizes) != product:
        raise ValueError(f"{name} is {sizes}, whose product is {math.prod(sizes)}; the layer has {product} features")
    return sizes
