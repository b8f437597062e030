"""Convolutions with a Tucker weight."""

from typing import Any, Literal

from torch import Tensor, nn

import tucker_kernels as tk
from tdlrt.layers.base import Device, DType, Modes, Ranks, TuckerLayer, copied, filled
from tucker_kernels.convolution import PerDimension, core_gradient
from tucker_kernels.validation import at_least, choice, per_dimension

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _TuckerConv(TuckerLayer):
    """Convolution whose weight (C_out, C_in, *window) is Tucker; arguments as in `torch.nn.Conv*` plus ranks and modes.

    ranks: a fraction, an integer cap, a tuple, or None (full); modes: "channels" (a factor on C_out and C_in) or "all".
    """

    dimensions = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerDimension,
        stride: PerDimension = 1,
        padding: PerDimension | Literal["same", "valid"] = 0,
        dilation: PerDimension = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        ranks: Ranks = None,
        modes: Modes = "channels",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        channels = at_least("in_channels", in_channels, 1), at_least("out_channels", out_channels, 1)
        sizes = (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        window, stride, dilation = (tuple(per_dimension(*size, self.dimensions, 1)) for size in sizes)
        if isinstance(padding, str):
            choice("padding", padding, ("same", "valid"))
        else:
            padding = tuple(per_dimension("padding", padding, self.dimensions, 0))
        choice("padding_mode", padding_mode, PADDING_MODES)
        # A dense layer on the meta device works out paddings as torch does.
        geometry = (window, stride, padding, dilation)
        dense = self.dense_class()(*channels, *geometry, bias=False, padding_mode=padding_mode, device="meta")
        super().__init__(dense.weight.shape, ranks, modes, bias, device, dtype)
        self._take_geometry(dense)
        self.reset_parameters()

    @classmethod
    def dense_class(cls):
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[cls.dimensions - 1]

    def _take_geometry(self, dense):
        self.stride, self.dilation = dense.stride, dense.dilation
        self.padding, self.padding_mode = dense.padding, dense.padding_mode
        before_after = list(dense._reversed_padding_repeated_twice)
        pairs = list(zip(before_after[0::2], before_after[1::2]))[::-1]
        symmetric = all(a == b for a, b in pairs)
        # What the operator pads itself, and what must be padded before it (torch.nn.functional.pad's order).
        if self.padding_mode == "zeros" and symmetric:
            self._inner_padding, self._outer_padding = tuple(a for a, _ in pairs), None
        else:
            self._inner_padding, self._outer_padding = (0,) * self.dimensions, before_after

    def _padded(self, input):
        if self._outer_padding is None:
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return nn.functional.pad(input, self._outer_padding, mode=mode)

    def forward(self, input: Tensor) -> Tensor:
        batched = input if input.ndim == self.dimensions + 2 else input.unsqueeze(0)
        x, core, bias, factors = self._operands(self._padded(batched))
        geometry = (self.stride, self._inner_padding, self.dilation)
        y = tk.tucker_conv(x, core, factors, bias, *geometry, path=self.path, memory=self.chosen_paths)
        return y if batched is input else y.squeeze(0)

    def core_gradient(self, input, grad_output, factors, known=None):
        """Gradient of the loss with respect to a core in the given bases, from one call's input and output gradient.

        Both lie in the layer's own shapes. With augmented bases it is the augmented core gradient.
        known: sizes of a leading block whose gradient the caller has; it may be left zero.
        """
        if input.ndim == self.dimensions + 1:
            input, grad_output = input.unsqueeze(0), grad_output.unsqueeze(0)
        dtype, window = self.core.dtype, self.weight_shape[2:]
        geometry = (self.stride, self._inner_padding, self.dilation)
        if known is not None:
            window_ranks = [n if f is None else f.shape[1] for n, f in zip(window, factors[2:])]
            known = known[:2] if window_ranks == list(known[2:]) else None
        images = self._padded(input).to(dtype), grad_output.to(dtype)
        return core_gradient(*images, factors, window, geometry, known or ())

    @classmethod
    def like(cls, layer, ranks, modes, bias, dtype):
        """A fresh Tucker layer with the shape and geometry of an `nn.Conv*`, on its device."""
        return cls(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation),
            bias=bias,
            padding_mode=layer.padding_mode,
            ranks=ranks,
            modes=modes,
            device=layer.weight.device,
            dtype=dtype,
        )

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        ranks: Ranks = None,
        tol: float | None = None,
        modes: Modes = "channels",
        method: Literal["hosvd", "hooi"] = "hosvd",
    ) -> "_TuckerConv":
        """The Tucker layer nearest to a dense one by truncated HOSVD, at `ranks` or to the relative tolerance `tol`.

        With neither it keeps every rank full and equals the dense layer. method="hooi" goes on to the nearest weight of
        the ranks found. Raises ValueError for grouped convolutions (see `TuckerGroupedConv`).
        """
        if type(layer) is not cls.dense_class():
            raise TypeError(f"layer must be a {cls.dense_class().__name__}, got {type(layer).__name__}")
        if layer.groups != 1:
            raise ValueError(f"layer has groups={layer.groups}; TuckerGroupedConv.from_dense takes it")
        core, factors = cls._truncated(layer.weight, ranks, tol, modes, method)
        new = cls.like(layer, tuple(core.shape), modes, layer.bias is not None, layer.weight.dtype)
        return filled(new, layer, core, factors)

    def to_dense(self) -> nn.Module:
        """The `nn.Conv*` with the reconstructed weight."""
        out_channels, in_channels, *window = self.weight_shape
        dense = self.dense_class()(
            *(in_channels, out_channels, tuple(window), self.stride, self.padding, self.dilation),
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=self.core.device,
            dtype=self.core.dtype,
        )
        return copied(dense, self.weight, self.bias).train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The same map as plain layers: 1×1 convolution, core convolution, 1×1 convolution."""
        core = tk.multi_mode_dot(self.core, [None, None, *self.factors[2:]]).detach()
        out_factor, in_factor = self.factors[0], self.factors[1]
        conv, ones = self.dense_class(), (1,) * self.dimensions
        options = {"device": core.device, "dtype": core.dtype}
        layers = []

        def pointwise(matrix, bias=None):
            layer = conv(matrix.shape[1], matrix.shape[0], ones, bias=bias is not None, **options)
            layers.append(copied(layer, matrix.reshape(*matrix.shape, *ones), bias))

        if in_factor is not None:
            pointwise(in_factor.T)
        last = out_factor is None
        middle = conv(
            *(core.shape[1], core.shape[0], tuple(core.shape[2:]), self.stride, self.padding, self.dilation),
            bias=last and self.bias is not None,
            padding_mode=self.padding_mode,
            **options,
        )
        layers.append(copied(middle, core, self.bias if last else None))
        if not last:
            pointwise(out_factor, self.bias)
        return nn.Sequential(*layers).train(self.training)

    def extra_repr(self):
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class TuckerConv1d(_TuckerConv):
    __doc__ = _TuckerConv.__doc__
    dimensions = 1


class TuckerConv2d(_TuckerConv):
    __doc__ = _TuckerConv.__doc__
    dimensions = 2


class TuckerConv3d(_TuckerConv):
    __doc__ = _TuckerConv.__doc__
    dimensions = 3
