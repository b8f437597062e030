"""Named problem shapes, shared by the tests of several operators."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Conv:
    """A Tucker convolution. A rank of None is a mode that is not factorised."""

    name: str
    n_out: int = 6
    n_in: int = 5
    r_out: int | None = 3
    r_in: int | None = 2
    window: tuple = (3, 3)
    window_ranks: tuple | None = None
    size: tuple = (7, 6)
    batch: int = 2
    stride: int | tuple = 1
    padding: int | tuple = 0
    dilation: int | tuple = 1
    bias: bool = True

    def __str__(self):
        return self.name

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def operands(self, dtype=torch.float64):
        """(input, core, factors, bias), with entries of variance about one."""
        full = (self.n_out, self.n_in, *self.window)
        ranks = (self.r_out, self.r_in, *(self.window_ranks or [None] * len(self.window)))
        core = torch.randn(*(n if r is None else r for n, r in zip(full, ranks)), dtype=dtype)
        factors = [None if r is None else torch.randn(n, r, dtype=dtype) / r**0.5 for n, r in zip(full, ranks)]
        bias = torch.randn(self.n_out, dtype=dtype) if self.bias else None
        return torch.randn(self.batch, self.n_in, *self.size, dtype=dtype), core, factors, bias


CONVS = [
    Conv("plain"),
    Conv("no_bias", bias=False),
    Conv("padding", padding=1),
    Conv("stride", stride=2, padding=1),
    Conv("dilation", dilation=2, padding=2),
    Conv("every_number_differs", stride=(2, 1), padding=(1, 2), dilation=(1, 2), size=(9, 8)),
    Conv("padding_beyond_the_window", window=(1, 1), padding=2, stride=3),
    Conv("window_1x1", window=(1, 1)),
    Conv("window_1x1_stride", window=(1, 1), stride=(2, 3)),
    Conv("window_5x1", window=(5, 1), padding=(2, 0)),
    Conv("window_factors", window_ranks=(2, 1), padding=1),
    Conv("one_window_factor", window_ranks=(None, 2), padding=1),
    Conv("odd_channels", n_out=13, n_in=7, r_out=5, r_in=3, padding=1),
    Conv("many_channels", n_out=40, n_in=33, r_out=17, r_in=12, padding=1),
    Conv("empty_batch", batch=0),
    Conv("one_pixel_out", size=(3, 3)),
    Conv("rank_one", r_out=1, r_in=1, padding=1),
    Conv("full_rank", r_out=6, r_in=5, padding=1),
    Conv("more_than_half_rank", r_out=5, r_in=4, padding=1),
    Conv("one_channel", n_in=1, r_in=1, padding=1),
    Conv("no_out_factor", r_out=None, padding=1),
    Conv("no_in_factor", r_in=None, padding=1),
    Conv("no_factor", r_out=None, r_in=None, padding=1, stride=2),
    Conv("sequence", window=(3,), size=(9,), stride=2, padding=1, dilation=2),
    Conv("sequence_window_factor", window=(5,), size=(9,), window_ranks=(2,), padding=2),
    Conv("volume", window=(3, 2, 3), size=(5, 4, 6), stride=(1, 2, 1), padding=(1, 0, 1)),
    Conv("volume_window_factors", window=(2, 3, 1), size=(4, 5, 3), window_ranks=(2, 2, 1)),
]


@dataclass(frozen=True)
class Linear:
    """A Tucker linear layer whose weight is seen as (*outer, *inner)."""

    name: str
    outer: tuple = (7,)
    inner: tuple = (6,)
    ranks: tuple = (3, 2)
    rows: tuple = (4,)
    bias: bool = True

    def __str__(self):
        return self.name

    def operands(self, dtype=torch.float64):
        full = (*self.outer, *self.inner)
        core = torch.randn(*(n if r is None else r for n, r in zip(full, self.ranks)), dtype=dtype)
        factors = [None if r is None else torch.randn(n, r, dtype=dtype) / r**0.5 for n, r in zip(full, self.ranks)]
        n_out, n_in = torch.Size(self.outer).numel(), torch.Size(self.inner).numel()
        bias = torch.randn(n_out, dtype=dtype) if self.bias else None
        return torch.randn(*self.rows, n_in, dtype=dtype), core, factors, bias


LINEARS = [
    Linear("matrix"),
    Linear("no_bias", bias=False),
    Linear("rank_one", ranks=(1, 1)),
    Linear("full_rank", ranks=(7, 6)),
    Linear("more_than_half_rank", ranks=(5, 5)),
    Linear("no_out_factor", ranks=(None, 2)),
    Linear("no_in_factor", ranks=(3, None)),
    Linear("no_factor", ranks=(None, None)),
    Linear("wide", outer=(65,), inner=(130,), ranks=(17, 9), rows=(33,)),
    Linear("vector", rows=()),
    Linear("no_rows", rows=(0,)),
    Linear("sequence", rows=(2, 3, 5)),
    Linear("tensorised", outer=(3, 4), inner=(2, 5), ranks=(2, 3, 2, 3)),
    Linear("tensorised_input", outer=(7,), inner=(4, 3, 2), ranks=(3, 2, 3, 2), rows=(5,)),
    Linear("tensorised_output", outer=(4, 3, 2), inner=(7,), ranks=(2, 3, 2, 4), bias=False),
    Linear("tensorised_unfactorised_output", outer=(3, 4), inner=(2, 5), ranks=(None, None, 2, 3)),
    Linear("tensorised_unfactorised_input", outer=(3, 4), inner=(2, 5), ranks=(2, 3, None, None)),
    Linear("tensorised_without_factors", outer=(3, 4), inner=(2, 5), ranks=(None,) * 4),
    Linear("tensorised_without_rows", outer=(3, 4), inner=(2, 5), ranks=(2, 3, 2, 3), rows=(0,)),
    Linear("tensorised_growing", outer=(2, 3), inner=(3, 2), ranks=(4, 2, 5, 3)),
    Linear("tensorised_wide", outer=(9, 20), inner=(17, 12), ranks=(5, 11, 8, 7), rows=(3, 70)),
    Linear("nine_modes", outer=(2, 1, 3, 2), inner=(2, 3, 1, 2, 2), ranks=(2, 1, 2, 1, 2, 2, 1, None, 1)),
    Linear("tensorised_partly", outer=(3, 4, 2), inner=(5, 2), ranks=(2, None, 1, 3, None), rows=(2, 3)),
]


def linear_operands(rows, has_factor, bias=True):
    """(input, core, factors, bias) of a weight (3·4) × (2·5), with a factor where `has_factor` says so."""
    modes = [(n, r if has else n) for has, n, r in zip(has_factor, (3, 4, 2, 5), (2, 3, 2, 4))]
    factors = [torch.randn(n, r, dtype=torch.float64) if has else None for has, (n, r) in zip(has_factor, modes)]
    core = torch.randn([r for _, r in modes], dtype=torch.float64)
    bias = torch.randn(12, dtype=torch.float64) if bias else None
    return torch.randn(*rows, 10, dtype=torch.float64), core, factors, bias


def linear_tensors(*how, **options):
    """Those of `linear_operands`, one after the other: input, core, bias, factors."""
    input, core, factors, bias = linear_operands(*how, **options)
    return [x for x in (input, core, bias, *factors) if x is not None]


@st.composite
def tensors(draw, dtypes=(torch.float32, torch.float64), most_modes=5, most_elements=20_000, smallest=0):
    """Random tensors of any number of modes, sizes (also 0 and 1) and memory layout, dense or not."""
    shape = draw(st.lists(st.integers(smallest, 70), min_size=1, max_size=most_modes))
    while torch.Size(shape).numel() > most_elements:
        largest = max(range(len(shape)), key=lambda i: shape[i])
        shape[largest] = (shape[largest] + 1) // 2
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 1, 2]))
    stored = [shape[i] for i in order]
    stored[-1] *= step
    inverse = [order.index(i) for i in range(len(shape))]
    return torch.randn(stored).to(draw(st.sampled_from(dtypes)))[..., ::step].permute(inverse)
