"""Layers with a Tucker weight `W = core ×_i factors[i]`. They hold parameters; the arithmetic is tucker_kernels'."""

import math

import torch
from torch import nn

import tucker_kernels as tk

# modes="channels" | "all": which modes of the weight carry a factor.
MODES = ("channels", "all")


class TuckerLayer(nn.Module):
    """What the Tucker layers share: `core`, `factors`, `bias`, ranks that may change, and conversion.

    Attributes:
        core: parameter, one dimension per mode of the weight; a mode without a factor keeps its full size.
        factors: one entry per mode, a parameter (n_i, r_i) with orthonormal columns, or `None`.
        bias: parameter or `None`.
        path: "auto", "chain", "fused" or "reconstruct", passed to the operator.
        train_bases: whether the forward pass asks for gradients of the factors; the optimiser clears it for steps that
            update cores only.
    """

    def __init__(self, weight_shape, ranks, modes, bias, device=None, dtype=None):
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.path = "auto"
        self.train_bases = True
        modes = factorised_modes(modes, len(self.weight_shape))
        ranks = mode_ranks(ranks, self.weight_shape, modes)
        options = {"device": device, "dtype": dtype}
        self.core = nn.Parameter(torch.empty(ranks, **options))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(n, r, **options)) if i in modes else None
            for i, (n, r) in enumerate(zip(self.weight_shape, ranks))
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features_of(self.weight_shape), **options))
        else:
            self.register_parameter("bias", None)

    def out_features_of(self, shape):
        return shape[0]

    @property
    def fan_in(self):
        return math.prod(self.weight_shape) // self.out_features_of(self.weight_shape)

    @torch.no_grad()
    def reset_parameters(self):
        """Random orthonormal factors, and a core that gives W the norm of torch's default initialisation.

        Entries of a default weight have variance 1 / (3 fan_in); ‖W‖ = ‖core‖ because the factors are orthonormal.
        """
        for factor in self.factors:
            if factor is not None:
                nn.init.orthogonal_(factor)
        norm = math.sqrt(math.prod(self.weight_shape) / (3 * self.fan_in))
        self.core.normal_()
        self.core.mul_(norm / torch.linalg.vector_norm(self.core))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.fan_in)
            self.bias.uniform_(-bound, bound)

    @property
    def modes(self):
        """The factorised modes."""
        return tuple(i for i, factor in enumerate(self.factors) if factor is not None)

    @property
    def ranks(self):
        """One rank per mode; the mode's size where it is not factorised."""
        return tuple(self.core.shape)

    @property
    def weight(self):
        """The dense weight, reconstructed: differentiable, in the shape the dense layer has."""
        full = tk.tucker_to_tensor(self.core, list(self.factors))
        return full.reshape(self.dense_shape)

    @property
    def dense_shape(self):
        return self.weight_shape

    @torch.no_grad()
    def assign(self, core, factors):
        """Replaces core and factors in place by ones of any rank; the parameters stay the same objects."""
        replace_data(self.core, core)
        for own, new in zip(self.factors, factors):
            if own is not None:
                replace_data(own, new)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A state dict carries its ranks in its shapes: take them over before torch compares sizes.
        stored = [(self.core, "core")] + [(f, f"factors.{i}") for i, f in enumerate(self.factors) if f is not None]
        for own, name in stored:
            new = state_dict.get(prefix + name)
            if new is not None and new.ndim == own.ndim and new.shape != own.shape:
                replace_data(own, torch.empty_like(new, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _operands(self, input):
        """Input, core, factors and bias, in autocast's dtype where it is on."""
        factors = [f if f is None or self.train_bases else f.detach() for f in self.factors]
        tensors = [input, self.core, self.bias, *factors]
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
        input, core, bias, *factors = tensors
        return input, core, bias, factors

    @classmethod
    def _truncated(cls, weight, ranks, tol, modes):
        """Core and factors of a dense weight by truncated HOSVD, at ranks or to a relative tolerance."""
        modes = factorised_modes(modes, weight.ndim)
        if ranks is not None and tol is not None:
            raise ValueError(f"give either ranks or tol: ranks is {ranks} and tol is {tol}")
        if tol is None:
            bounds = {"ranks": mode_ranks(ranks, weight.shape, modes)}
        else:
            bounds = {"tol": tol}
        work = weight.detach()
        if work.dtype not in (torch.float32, torch.float64):
            work = work.float()
        (core,), (projections,), found, _ = tk.hosvd_truncate([work.contiguous()], modes=modes, **bounds)
        found = found[0].tolist()
        core = core[tuple(slice(0, r) for r in found)].contiguous()
        return core, [None if p is None else p[:, :r].contiguous() for p, r in zip(projections, found)]

    def extra_repr(self):
        return f"weight={self.weight_shape}, ranks={self.ranks}, modes={self.modes}, bias={self.bias is not None}"

    def __repr__(self):
        return f"{type(self).__name__}({self.extra_repr()})"


def replace_data(parameter, data):
    """`parameter.data = data`, also when the shape changes while an old graph is alive.

    torch keeps the gradient accumulator of a parameter, with the shape it had, as long as any graph that used it
    (say the last loss) is referenced, and only a change of dtype makes it forget; hence the detour.
    """
    if parameter.shape != data.shape:
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.grad = None
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def factorised_modes(modes, ndim):
    """The mode numbers that "channels" (the first two), "all" or a sequence of numbers stands for."""
    if modes == "channels":
        return (0, 1)
    if modes == "all":
        return tuple(range(ndim))
    if isinstance(modes, str) or not all(isinstance(m, int) and 0 <= m < ndim for m in modes):
        raise ValueError(f"modes is {modes!r}; allowed are 'channels', 'all' or mode numbers from 0 to {ndim - 1}")
    return tuple(sorted(set(modes)))


def mode_ranks(ranks, shape, modes):
    """One feasible rank per mode: from None (full), a fraction of each mode, an integer cap, or a tuple of caps.

    Only factorised modes are reduced. A rank never exceeds the product of the others.
    """
    if isinstance(ranks, float):
        if not 0 < ranks <= 1:
            raise ValueError(f"ranks is {ranks}; a fraction must lie in (0, 1]")
        wanted = [max(1, round(ranks * n)) for n in shape]
    elif isinstance(ranks, int) and not isinstance(ranks, bool):
        if ranks < 1:
            raise ValueError(f"ranks is {ranks}; an integer must be at least 1")
        wanted = [ranks] * len(shape)
    elif ranks is None:
        wanted = list(shape)
    else:
        wanted = list(ranks)
        if len(wanted) == len(modes) < len(shape):
            given = dict(zip(modes, wanted))
            wanted = [given.get(i, n) for i, n in enumerate(shape)]
        if len(wanted) != len(shape) or not all(isinstance(r, int) and r >= 1 for r in wanted):
            raise ValueError(
                f"ranks is {ranks!r}; allowed are a fraction in (0, 1], an integer, or one positive integer per mode "
                f"({len(shape)}) or per factorised mode ({len(modes)})"
            )
    result = [min(r, n) if i in modes else n for i, (r, n) in enumerate(zip(wanted, shape))]
    while infeasible := [i for i in modes if result[i] > math.prod(result) // result[i]]:
        result[infeasible[0]] = math.prod(result) // result[infeasible[0]]
    return tuple(result)


class _TuckerConv(TuckerLayer):
    """Convolution whose weight (C_out, C_in, *window) is Tucker; arguments as in `torch.nn.Conv*` plus ranks and modes.

    ranks: a fraction, an integer cap, a tuple, or None (full); modes: "channels" (a factor on C_out and C_in) or "all".
    """

    dimensions = 2

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        bias=True,
        padding_mode="zeros",
        ranks=None,
        modes="channels",
        device=None,
        dtype=None,
    ):
        # A dense layer on the meta device checks the arguments and works out paddings as torch does.
        dense = self.dense_class()(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            bias=bias,
            padding_mode=padding_mode,
            device="meta",
        )
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

    def forward(self, input):
        batched = input if input.ndim == self.dimensions + 2 else input.unsqueeze(0)
        x, core, bias, factors = self._operands(self._padded(batched))
        y = tk.tucker_conv(x, core, factors, bias, self.stride, self._inner_padding, self.dilation, path=self.path)
        return y if batched is input else y.squeeze(0)

    def core_gradient(self, input, grad_output, factors):
        """Gradient of the loss with respect to a core in the given bases, from one call's input and output gradient.

        Both lie in the layer's own shapes. With augmented bases it is the augmented core gradient.
        """
        if input.ndim == self.dimensions + 1:
            input, grad_output = input.unsqueeze(0), grad_output.unsqueeze(0)
        x, grad_output = self._padded(input).to(self.core.dtype), grad_output.to(self.core.dtype)
        window = self.weight_shape[2:]
        geometry = (self.stride, self._inner_padding, self.dilation)
        return tk.tucker_conv_core_grad(x, grad_output, factors, window, *geometry)

    @classmethod
    def from_dense(cls, layer, ranks=None, tol=None, modes="channels"):
        """The Tucker layer nearest to a dense one by truncated HOSVD, at `ranks` or to the relative tolerance `tol`.

        With neither it keeps every rank full and equals the dense layer. Raises ValueError for grouped or transposed
        convolutions.
        """
        if type(layer) is not cls.dense_class():
            raise TypeError(f"layer must be a {cls.dense_class().__name__}, got {type(layer).__name__}")
        if layer.groups != 1:
            raise ValueError(f"layer has groups={layer.groups}; only groups=1 can be factorised")
        core, factors = cls._truncated(layer.weight, ranks, tol, modes)
        new = cls(
            *(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation),
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            ranks=tuple(core.shape),
            modes=modes,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        return _filled(new, layer, core, factors)

    def to_dense(self):
        """The `nn.Conv*` with the reconstructed weight."""
        out_channels, in_channels, *window = self.weight_shape
        dense = self.dense_class()(
            *(in_channels, out_channels, tuple(window), self.stride, self.padding, self.dilation),
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=self.core.device,
            dtype=self.core.dtype,
        )
        return _copied(dense, self.weight, self.bias).train(self.training)

    def to_sequential(self):
        """The same map as plain layers: 1×1 convolution, core convolution, 1×1 convolution."""
        core = tk.multi_mode_dot(self.core, [None, None, *self.factors[2:]]).detach()
        out_factor, in_factor = self.factors[0], self.factors[1]
        conv, ones = self.dense_class(), (1,) * self.dimensions
        options = {"device": core.device, "dtype": core.dtype}
        layers = []

        def pointwise(matrix, bias=None):
            layer = conv(matrix.shape[1], matrix.shape[0], ones, bias=bias is not None, **options)
            layers.append(_copied(layer, matrix.reshape(*matrix.shape, *ones), bias))

        if in_factor is not None:
            pointwise(in_factor.T)
        last = out_factor is None
        middle = conv(
            *(core.shape[1], core.shape[0], tuple(core.shape[2:]), self.stride, self.padding, self.dilation),
            bias=last and self.bias is not None,
            padding_mode=self.padding_mode,
            **options,
        )
        layers.append(_copied(middle, core, self.bias if last else None))
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


class TuckerLinear(TuckerLayer):
    """Linear layer whose weight, seen as (*out_modes, *in_modes), is Tucker; two modes are U C Vᵀ.

    in_features, out_features: an integer, or a tuple of mode sizes whose product is the number of features.
    ranks: a fraction, an integer cap, a tuple, or None (full). Every mode carries a factor unless `modes` names fewer.
    """

    def __init__(self, in_features, out_features, bias=True, ranks=None, modes="all", device=None, dtype=None):
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

    def forward(self, input):
        x, core, bias, factors = self._operands(input)
        return tk.tucker_linear(x, core, factors, bias, self.out_modes, path=self.path)

    def core_gradient(self, input, grad_output, factors):
        """Gradient of the loss with respect to a core in the given bases, from one call's input and output gradient.

        Both lie in the layer's own shapes. With augmented bases it is the augmented core gradient.
        """
        x, grad_output = input.to(self.core.dtype), grad_output.to(self.core.dtype)
        return tk.tucker_linear_core_grad(x, grad_output, factors, self.weight_shape, self.out_modes)

    @classmethod
    def from_dense(cls, layer, ranks=None, tol=None, modes="all", in_modes=None, out_modes=None):
        """The Tucker layer nearest to an `nn.Linear` by truncated HOSVD, at `ranks` or to the relative tolerance `tol`.

        in_modes, out_modes: mode sizes to fold the features into; default one mode on each side.
        """
        if type(layer) is not nn.Linear:
            raise TypeError(f"layer must be a Linear, got {type(layer).__name__}")
        sizes_in = _mode_sizes("in_modes", in_modes or layer.in_features, layer.in_features)
        sizes_out = _mode_sizes("out_modes", out_modes or layer.out_features, layer.out_features)
        modes = _linear_modes(modes)
        core, factors = cls._truncated(layer.weight.reshape(*sizes_out, *sizes_in), ranks, tol, modes)
        new = cls(
            *(sizes_in, sizes_out),
            bias=layer.bias is not None,
            ranks=tuple(core.shape),
            modes=modes,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        return _filled(new, layer, core, factors)

    def to_dense(self):
        """The `nn.Linear` with the reconstructed weight."""
        dense = nn.Linear(
            *(self.in_features, self.out_features),
            bias=self.bias is not None,
            device=self.core.device,
            dtype=self.core.dtype,
        )
        return _copied(dense, self.weight, self.bias).train(self.training)

    def to_sequential(self):
        """The same map as plain layers: project, core, expand; one dense layer for more than two modes."""
        if len(self.weight_shape) > 2:
            return nn.Sequential(self.to_dense())
        left, right = self.factors
        matrices = [None if right is None else right.T, self.core, left]
        matrices = [m for m in matrices if m is not None]
        layers = []
        for i, matrix in enumerate(matrices):
            bias = self.bias if i == len(matrices) - 1 else None
            layer = nn.Linear(*matrix.shape[::-1], bias=bias is not None, device=matrix.device, dtype=matrix.dtype)
            layers.append(_copied(layer, matrix, bias))
        return nn.Sequential(*layers).train(self.training)


def _linear_modes(modes):
    # A linear layer has no window: "channels" and "all" mean the same.
    return "all" if modes == "channels" else modes


def _mode_sizes(name, value, product=None):
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not sizes or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"{name} is {value!r}; allowed are a positive integer or a tuple of them")
    if product is not None and math.prod(sizes) != product:
        raise ValueError(f"{name} is {sizes}, whose product is {math.prod(sizes)}; the layer has {product} features")
    return sizes


@torch.no_grad()
def _copied(layer, weight, bias):
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


@torch.no_grad()
def _filled(new, dense, core, factors):
    dtype = dense.weight.dtype
    new.assign(core.to(dtype), [None if f is None else f.to(dtype) for f in factors])
    if dense.bias is not None:
        new.bias.copy_(dense.bias)
    new.requires_grad_(dense.weight.requires_grad)
    return new.train(dense.training)
