"""What each kernel here costs: operations, and bytes that must cross the memory once however well caches work.

`tests/triton_backend` counts the same numbers in the interpreter. What several programs read counts
once; what a second-stage sum reads again is in its own row and added here.
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Cost:
    flops: int
    read: int
    written: int

    @property
    def bytes(self):
        return self.read + self.written

    def __add__(self, other):
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)


def product(rows, inner, columns, size):
    """A plain product, as the library does it."""
    return Cost(2 * rows * inner * columns, size * (rows * inner + inner * columns), size * rows * columns)


def tucker_core_expand(pixels_in, pixels_out, channels, r_in, r_out, window, size, save=False):
    """Core convolution from r_in to r_out and expansion to `channels`; for the data gradient, with the roles turned."""
    taps = prod(window)
    flops = 2 * pixels_out * r_out * (taps * r_in + channels)
    read = size * (pixels_in * r_in + taps * r_in * r_out + channels * r_out)
    return Cost(flops, read, size * pixels_out * (channels + (r_out if save else 0)))


def ordered_sum(runs, elements, size):
    return Cost(0, 4 * runs * elements, size * elements)


def project_accumulate(pixels, columns, rank, other, size, runs=1):
    """D (rank columns) and G (`other` columns) in one read; rank 0: the accumulation alone."""
    flops = 2 * pixels * columns * (rank + other)
    read = size * (pixels * columns + columns * rank + pixels * other)
    first = Cost(flops, read, size * pixels * rank + 4 * runs * columns * other)
    return first + ordered_sum(runs, columns * other, size)


def rank_space_wgrad(pixels_in, pixels_out, rows, columns, window, size, runs=1, known=(0, 0)):
    """`rows` × `columns` of each tap, less the block `known`."""
    taps = prod(window)
    elements = rows * columns - known[0] * known[1]
    read = size * (pixels_in * columns + pixels_out * rows)
    first = Cost(2 * pixels_out * taps * elements, read, 4 * runs * taps * elements)
    return first + ordered_sum(runs, taps * elements, size)


def tucker_linear(rows, n_in, n_out, r_in, r_out, size, save=False):
    flops = 2 * rows * (n_in * r_in + r_in * r_out + r_out * n_out)
    read = size * (rows * n_in + n_in * r_in + r_in * r_out + n_out * r_out)
    return Cost(flops, read, size * rows * (n_out + (r_in + r_out if save else 0)))
