"""What Tucker layers share: parameters of changing size, ranks, and the way from and to dense weights."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

import tucker_kernels as tk
from tucker_kernels.validation import FLOATING, choice, flag, number, shown

# modes="channels" | "all": which modes of the weight carry a factor.
MODES = ("channels", "all")
# How a dense weight is truncated: HOSVD, or HOOI, which goes on from there to the nearest weight of these ranks.
METHODS = ("hosvd", "hooi")
Modes = Literal["channels", "all"] | Sequence[int]
Ranks = int | float | Sequence[int] | None  # see `mode_ranks`
Device = torch.device | str | int | None  # these as the constructors of torch's layers take them
DType = torch.dtype | None


class _Factors(nn.ParameterList):
    """A `ParameterList` read in two calls an entry; torch's takes six, and a training step reads all of them often."""

    def __iter__(self):
        return iter([getattr(self, str(i)) for i in range(len(self))])


class TuckerLayer(nn.Module):
    """What the Tucker layers share: `core`, `factors`, `bias`, ranks that may change, and conversion.

    Attributes:
        core: parameter, one dimension per mode of the weight; a mode without a factor keeps its full size.
        factors: one entry per mode, a parameter (n_i, r_i) with orthonormal columns, or `None`.
        bias: parameter or `None`.
        modes: the factorised modes.
        path: "auto", "chain", "fused" or "reconstruct", passed to the operator.
        train_bases: whether the forward pass asks for gradients of the factors; the optimiser clears it for steps that
            update cores only.
    """

    def __init__(self, weight_shape, ranks, modes, bias, device=None, dtype=None):
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.path = "auto"
        self.chosen_paths = {}  # by "auto", last: {whether gradients were wanted: path}
        self.train_bases = True
        self.modes: tuple[int, ...] = factorised_modes(modes, len(self.weight_shape))
        ranks = mode_ranks(ranks, self.weight_shape, self.modes)
        flag("bias", bias)
        check_placement(device, dtype)
        options = {"device": device, "dtype": dtype}
        self.core = nn.Parameter(torch.empty(ranks, **options))
        self.factors = _Factors(
            nn.Parameter(torch.empty(n, r, **options)) if i in self.modes else None
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
                full = torch.promote_types(factor.dtype, torch.float32)  # half precision has no QR
                factor.copy_(nn.init.orthogonal_(torch.empty_like(factor, dtype=full)))
        norm = math.sqrt(math.prod(self.weight_shape) / (3 * self.fan_in))
        self.core.normal_()
        self.core.mul_(norm / torch.linalg.vector_norm(self.core))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.fan_in)
            self.bias.uniform_(-bound, bound)

    @property
    def ranks(self) -> tuple[int, ...]:
        """One rank per mode; the mode's size where it is not factorised."""
        return tuple(self.core.shape)

    @property
    def weight(self) -> Tensor:
        """The dense weight, reconstructed: differentiable, in the shape the dense layer has."""
        full = tk.tucker_to_tensor(self.core, list(self.factors))
        return full.reshape(self.dense_shape)

    def double_weight(self) -> Tensor:
        """`weight` computed in float64 whatever the layer's dtype."""
        factors = [None if f is None else f.double() for f in self.factors]
        return tk.tucker_to_tensor(self.core.double(), factors).reshape(self.dense_shape)

    @property
    def dense_shape(self):
        return self.weight_shape

    def weight_parameters(self) -> list[nn.Parameter]:
        """Core and factors, the parameters whose shapes change."""
        return [self.core, *(factor for factor in self.factors if factor is not None)]

    def assign(self, core: Tensor, factors: Sequence[Tensor | None]) -> None:
        """Replaces core and factors in place by ones of any rank; the parameters stay the same objects."""
        replace_data(self.core, core)
        for own, new in zip(self.factors, factors):
            if own is not None:
                replace_data(own, new)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # A state dict carries its ranks in its shapes: take them over before torch compares sizes.
        core = state_dict.get(f"{prefix}core")
        if core is not None and self._has_sizes(state_dict, prefix, core.shape):
            shapes = core.shape, *zip(self.weight_shape, core.shape)
            for own, shape in zip((self.core, *self.factors), shapes):
                if own is not None and own.shape != shape:
                    replace_data(own, own.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _has_sizes(self, state_dict, prefix, ranks):
        """Whether a core of these ranks, and the factors stored with it, are those of a weight of this shape."""
        if len(ranks) != len(self.weight_shape):
            return False
        for i, (n, r) in enumerate(zip(self.weight_shape, ranks)):
            factor = state_dict.get(f"{prefix}factors.{i}")
            if r != n if self.factors[i] is None else factor is None or tuple(factor.shape) != (n, r):
                return False
        return True

    def _operands(self, input):
        """Input, core, factors and bias, in autocast's dtype where it is on."""
        factors = [f if f is None or self.train_bases else f.detach() for f in self.factors]
        tensors = [input, self.core, self.bias, *factors]
        dtype = autocast_dtype(input)
        if dtype is not None:
            lower = (torch.float32, torch.float16, torch.bfloat16)  # float64 and indices stay
            tensors = [t.to(dtype) if t is not None and t.dtype in lower else t for t in tensors]
        input, core, bias, *factors = tensors
        return input, core, bias, factors

    def projecting(self, output):
        """The node of an output in the graph from which to receive what it projects on the factors, to be kept for
        `core_gradient`; None where there is none or that would save too little."""
        return None

    def input_norm(self, input):
        """Norm of an input as the factor of a weight gradient."""
        return torch.linalg.vector_norm(input)

    @classmethod
    def _truncated(cls, weight, ranks, tol, modes, method):
        """Core and factors of a dense weight by truncated HOSVD or HOOI, at ranks or to a relative tolerance."""
        choice("method", method, METHODS)
        modes = factorised_modes(modes, weight.ndim)
        if ranks is not None and tol is not None:
            raise ValueError(f"give either ranks or tol: ranks is {shown(ranks)} and tol is {shown(tol)}")
        if tol is None:
            bounds = {"ranks": mode_ranks(ranks, weight.shape, modes)}
        else:
            number("tol", tol, "numbers from 0 to below 1", lambda value: 0 <= value < 1)
            bounds = {"tol": tol}
        work = weight.detach()
        if work.is_meta:
            if tol is not None:
                raise ValueError(f"tol is {tol}, but a weight on the meta device has no values to find ranks from")
            sizes = enumerate(zip(work.shape, bounds["ranks"]))
            return work.new_empty(bounds["ranks"]), [work.new_empty(size) if i in modes else None for i, size in sizes]
        if work.dtype not in (torch.float32, torch.float64):
            work = work.float()
        work, spans = shortened(work, modes)
        work = work.contiguous()
        (core,), (projections,), found, _ = tk.hosvd_truncate([work], modes=modes, **bounds)
        found = found[0].tolist()
        core = core[tuple(slice(0, r) for r in found)].contiguous()
        factors = [None if p is None else p[:, :r].contiguous() for p, r in zip(projections, found)]
        if method == "hooi":
            core, factors = hooi(work, core, factors)
        for mode, Q in spans.items():
            (factors[mode],) = tk.rotate_bases([Q], [factors[mode]])
        return core, factors

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


def shortened(tensor, modes):
    """(smaller, {mode: Q}) with tensor = smaller ×_mode Q and orthonormal Q, for one of `modes` that is longer than all
    others together, as the rows of an embedding are; (tensor, {}) where there is none.

    Its factor lies in the span of Q, so nothing is lost, and no matrix of that mode's size squared is formed.
    """
    mode = next((m for m in modes if tensor.shape[m] ** 2 > tensor.numel()), None)
    if mode is None:
        return tensor, {}
    Q, R = torch.linalg.qr(tk.unfold(tensor, mode))  # batched_qr may leave columns of Q zero
    return tk.fold(R, mode, [R.shape[0] if i == mode else n for i, n in enumerate(tensor.shape)]), {mode: Q}


def hooi(tensor, core, factors, most_sweeps=10):
    """Higher-order orthogonal iteration from an HOSVD, at its ranks: (core, factors) with no larger an error.

    Each factor in turn becomes the best one for the others, the leading left singular vectors of what they leave of the
    tensor. The error is √(‖tensor‖² − ‖core‖²). Source: De Lathauwer, De Moor & Vandewalle, "On the best rank-1 and
    rank-(R1, R2, ..., RN) approximation of higher-order tensors", 2000.
    """
    best, size = (core, factors), torch.linalg.vector_norm(core)
    factors = list(factors)
    modes = [i for i, factor in enumerate(factors) if factor is not None]
    for _ in range(most_sweeps if len(modes) > 1 else 0):
        for mode in modes:
            others = [None if i == mode else factor for i, factor in enumerate(factors)]
            left = tk.multi_mode_dot(tensor, others, transpose=True).contiguous()
            ranks = tuple(f.shape[1] if i == mode else n for i, (f, n) in enumerate(zip(factors, left.shape)))
            _, (projections,), _, _ = tk.hosvd_truncate([left], ranks=ranks, modes=(mode,))
            factors[mode] = projections[mode][:, : ranks[mode]].contiguous()
        core = tk.mode_dot(left, factors[mode], mode, transpose=True).contiguous()
        before, size = size, torch.linalg.vector_norm(core)
        if size <= before * (1 + 4 * torch.finfo(core.dtype).eps):
            break
        best = core, list(factors)
    return best


def autocast_dtype(tensor):
    """What autocast computes in on the tensor's device; None where it is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch knows none for meta
        return None
    return torch.get_autocast_dtype(device)


def factorised_modes(modes, ndim):
    """The mode numbers that "channels" (the first two), "all" or a sequence of numbers stands for."""
    if isinstance(modes, str) and modes in MODES:
        return (0, 1) if modes == "channels" else tuple(range(ndim))
    integers = isinstance(modes, (tuple, list, set, range)) and all(map(is_integer, modes))
    if not integers or not all(0 <= m < ndim for m in modes):
        kind = ValueError if integers or isinstance(modes, str) else TypeError
        raise kind(f"modes is {shown(modes)}; allowed are 'channels', 'all' or mode numbers from 0 to {ndim - 1}")
    return tuple(sorted({int(m) for m in modes}))


def is_integer(value):
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's too


def check_placement(device, dtype):
    """Raises TypeError or ValueError for a device that torch does not know and for a dtype that is not floating."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATING):
        raise TypeError(f"dtype is {shown(dtype)}; allowed are {', '.join(map(str, FLOATING))} or None")
    if device is not None:
        try:
            torch.device(device)
        except (TypeError, RuntimeError, ValueError) as error:
            kind = ValueError if isinstance(device, (str, int)) else TypeError
            raise kind(f"device is {shown(device)}; allowed are None and what torch.device takes here") from error


def mode_ranks(ranks, shape, modes):
    """One feasible rank per mode: from None (full), a fraction of those, an integer cap, or a tuple of caps.

    Only factorised modes are reduced. A rank never exceeds the product of the others.
    """
    if is_integer(ranks):
        if ranks < 1:
            raise ValueError(f"ranks is {ranks}; an integer must be at least 1")
        wanted = [int(ranks)] * len(shape)
    elif isinstance(ranks, Real) and not isinstance(ranks, bool):
        if not 0 < ranks <= 1:
            raise ValueError(f"ranks is {ranks}; a fraction must lie in (0, 1]")
        full = feasible(shape, modes)
        wanted = [max(1, round(float(ranks) * n)) for n in full]
    elif ranks is None:
        wanted = list(shape)
    else:
        wanted = list(ranks) if isinstance(ranks, (tuple, list)) else []
        if len(wanted) == len(modes) < len(shape):
            given = dict(zip(modes, wanted))
            wanted = [given.get(i, n) for i, n in enumerate(shape)]
        if len(wanted) != len(shape) or not all(is_integer(r) and r >= 1 for r in wanted):
            kinds = isinstance(ranks, (tuple, list)) and all(map(is_integer, ranks))
            raise (ValueError if kinds else TypeError)(
                f"ranks is {shown(ranks)}; allowed are a fraction in (0, 1], an integer, or one positive integer per "
                f"mode ({len(shape)}) or per factorised mode ({len(modes)})"
            )
    wanted = [int(r) for r in wanted]
    return tuple(feasible([min(r, n) if i in modes else n for i, (r, n) in enumerate(zip(wanted, shape))], modes))


def feasible(ranks, modes):
    """The ranks with none of these modes' above the product of the others."""
    ranks = list(ranks)
    while large := [i for i in modes if ranks[i] > math.prod(ranks) // ranks[i]]:
        ranks[large[0]] = math.prod(ranks) // ranks[large[0]]
    return ranks


@torch.no_grad()
def copied(layer, weight, bias):
    """The dense layer, with this weight and, where there is one, this bias copied into it."""
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


@torch.no_grad()
def filled(new, dense, core, factors):
    """The Tucker layer `new` with this core and these factors, and the bias, dtype and flags of `dense`."""
    dtype = dense.weight.dtype
    new.assign(core.to(dtype), [None if f is None else f.to(dtype) for f in factors])
    if new.bias is not None:
        new.bias.copy_(dense.bias)
    new.requires_grad_(dense.weight.requires_grad)
    return new.train(dense.training)
