"""Which path computes a Tucker convolution: operation and byte counts, and a few constants of the machine.

    chain        three library convolutions: 1×1 → core window → 1×1
    fused        the same in one kernel, where a back end has one: rank-space images stay in cache, taps outside the
                 image are skipped, and 3×3 windows of stride 1 may run in tiles with 36 products instead of 144
    reconstruct  the full weight, then one library convolution

    seconds = passes · (operations / (rate · threads) + bytes / bandwidth) + call

A forward and a backward pass are three (the backward has two products for each of the forward's). What a call costs
whatever its size differs with the direction and with one or several threads. The constants are shipped defaults, or
what `python -m tucker_kernels calibrate` measured and wrote to `machine_file()`.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from tucker_kernels.native import native_module
from tucker_kernels.reference import mode_order

_C, _ = native_module()  # `backends()` says why it is None
PATHS = ("chain", "fused", "reconstruct")
# By which the compiled kernel decides whether to work in tiles; None: never.
TILES = None if _C is None else _C.tile_costs()
HYSTERESIS = 0.1  # a path that is in use stays unless another is expected to take this much less time


class Conv(NamedTuple):
    """Sizes of a Tucker convolution; a rank of None is a channel mode without a factor.

    A tuple, which is hashed and compared without Python code: every call looks its path up by one.
    """

    batch: int
    n_out: int
    n_in: int
    r_out: int | None
    r_in: int | None
    size: tuple
    out_size: tuple
    window: tuple
    stride: tuple
    padding: tuple
    dilation: tuple

    @property
    def ranks(self):
        return (self.n_out if self.r_out is None else self.r_out, self.n_in if self.r_in is None else self.r_in)

    @property
    def pixels(self):
        return self.batch * math.prod(self.size), self.batch * math.prod(self.out_size)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Constants of one path in one dtype on one machine."""

    rate: float  # operations a second, of one thread
    bandwidth: float  # bytes a second
    forward: float  # seconds of a call without arithmetic
    training: float  # the same with a backward pass
    team: float  # how many times as long those are with several threads


# Measured on a Zen 4 core with AVX-512, rounded: float32 on half of the layers of bench/cost_model.py, the others by
# `python -m tucker_kernels calibrate`.
DEFAULTS = {
    "float32": {
        "chain": Rates(9.5e10, 1.4e10, 1.0e-4, 3.7e-4, 4.2),
        "fused": Rates(1.0e11, 1.9e10, 5.8e-5, 2.4e-4, 2.8),
        "reconstruct": Rates(1.0e11, 1.3e10, 8.2e-5, 4.1e-4, 2.5),
    },
    "float64": {
        "chain": Rates(5.2e10, 1.2e10, 6.3e-5, 3.1e-4, 4.5),
        "fused": Rates(5.8e10, 3.7e10, 4.5e-5, 1.8e-4, 2.8),
        "reconstruct": Rates(3.9e10, 4.7e10, 6.0e-5, 3.3e-4, 3.0),
    },
    "bfloat16": {
        "chain": Rates(2.3e11, 1.7e10, 1.9e-4, 6.6e-4, 2.4),
        "fused": Rates(1.1e11, 8.3e9, 5.5e-5, 2.1e-4, 2.8),
        "reconstruct": Rates(2.1e11, 5.4e9, 1.2e-4, 5.6e-4, 1.8),
    },
}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def machine_file():
    """Where the measured constants of this user's machine are kept."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "tucker-kernels" / "machine.json"


def load(file=None):
    """The constants per dtype: the shipped ones, replaced by those in the file. One that cannot be read is ignored."""
    rates = dict(DEFAULTS)
    file = machine_file() if file is None else Path(file)
    try:
        text = file.read_text()
    except OSError:
        if file.exists():
            warnings.warn(f"{file} cannot be read; the shipped constants are used", stacklevel=2)
        return rates
    try:
        given = {name: paths for name, paths in json.loads(text)["rates"].items() if name in DEFAULTS}
        found = {name: {path: Rates(**paths[path]) for path in PATHS} for name, paths in given.items()}
        for name, path in itertools.product(found, PATHS):
            if not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in vars(found[name][path]).values()):
                raise ValueError(f"{name}, {path} has a constant that is not a positive number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{file} does not hold constants ({error}); the shipped ones are used. Run "
            "`python -m tucker_kernels calibrate` to write it anew",
            stacklevel=2,
        )
        return rates
    return rates | found


def save(rates, file=None):
    """Writes constants per dtype so that `load` finds them; returns where."""
    file = machine_file() if file is None else Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    given = {dtype: {path: dataclasses.asdict(r) for path, r in paths.items()} for dtype, paths in rates.items()}
    temporary.write_text(json.dumps({"rates": given}, indent=1) + "\n")
    temporary.replace(file)
    return file


MACHINE = load()


def _inside(conv):
    """Taps that lie inside the image, summed over output pixels of one image."""
    total = 1
    for size, out, k, s, p, d in zip(conv.size, conv.out_size, conv.window, conv.stride, conv.padding, conv.dilation):
        count = 0
        for tap in range(k):
            first = max(0, -(-(p - tap * d) // s))
            count += max(0, min(out, -(-(size + p - tap * d) // s)) - first)
        total *= count
    return total


def _wide(rank):
    return -(-rank // 8) * 8  # half a vector


def operations(path, conv):
    """Multiply-adds times two of one forward pass."""
    (r_out, r_in), (pixels_in, pixels_out), taps = conv.ranks, conv.pixels, math.prod(conv.window)
    if path == "reconstruct":
        weight = 2 * taps * r_in * conv.n_out * (r_out + conv.n_in)
        return 2 * pixels_out * conv.n_in * conv.n_out * taps + weight
    first = 0 if conv.r_in is None else 2 * pixels_in * conv.n_in * _wide(r_in)
    last = 0 if conv.r_out is None else 2 * pixels_out * _wide(r_out) * conv.n_out
    if path == "chain":
        return first + 2 * pixels_out * _wide(r_in) * _wide(r_out) * taps + last
    return first + 2 * _window_products(conv) * _wide(r_in) * _wide(r_out) + last


def _window_products(conv):
    """Products per input and output channel of the fused kernel's core window, transforms of tiles included."""
    direct, (r_out, r_in) = conv.batch * _inside(conv), conv.ranks
    if not TILES or not r_out * r_in or conv.window != (3, 3) or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return direct
    per_tile, transforms, weight, gain = TILES
    tiles = conv.batch * math.prod([-(-n // 4) for n in conv.out_size])  # a list: torch.compile traces it
    tiled = tiles * (per_tile + transforms * max(r_out, r_in) / (r_out * r_in)) + weight
    return tiled if tiled < gain * direct else direct


@functools.lru_cache(1024)
def project_gradient(conv, known=(0, 0)):
    """Which bases to apply to the core gradient rather than to the images: a pair of flags (output, input).

    Applied early they cost a product for every pixel, and the gradient has only the ranks; applied late they cost one
    for every tap (three times as much each, measured), and the gradient has all channels. `known`, the leading block
    that is not computed, is left out only where both are early.
    """
    (pixels_in, pixels_out), taps = conv.pixels, math.prod(conv.window)

    def products(late):
        m, n = (size if later else r for later, size, r in zip(late, (conv.n_out, conv.n_in), conv.ranks))
        seen = conv._replace(r_out=m, r_in=n)
        count = _window_products(seen) * (m * n - (0 if any(late) else math.prod(known)))
        count += conv.n_out * conv.ranks[0] * (3 * taps * n if late[0] else pixels_out)
        return count + conv.n_in * conv.ranks[1] * (3 * taps * conv.ranks[0] if late[1] else pixels_in)

    choices = itertools.product(*((False,) if r is None else (False, True) for r in (conv.r_out, conv.r_in)))
    return min(choices, key=products)


def memory(path, conv, bytes_per_element):
    """Bytes that one forward pass reads and writes: images, and weights three times, which are packed first."""
    (r_out, r_in), (pixels_in, pixels_out), taps = conv.ranks, conv.pixels, math.prod(conv.window)
    elements = pixels_in * conv.n_in + pixels_out * conv.n_out
    if path == "reconstruct":
        return (elements + 3 * taps * conv.n_out * (conv.n_in + r_in)) * bytes_per_element
    for pixels, n, r in ((pixels_in, conv.n_in, conv.r_in), (pixels_out, conv.n_out, conv.r_out)):
        if r is not None:
            elements += 3 * n * r + (2 * pixels * r if path == "chain" else 0)
    return (elements + 3 * taps * r_out * r_in) * bytes_per_element


def seconds(path, conv, dtype="float32", training=False, threads=1, machine=None):
    """Expected time of a forward pass, or of a forward and a backward pass."""
    rates = (MACHINE if machine is None else machine)[dtype if dtype in DEFAULTS else "float32"][path]
    work = operations(path, conv) / (rates.rate * threads) + memory(path, conv, BYTES[dtype]) / rates.bandwidth
    call = (rates.training if training else rates.forward) * (rates.team if threads > 1 else 1)
    return (3 if training else 1) * work + call


def linear_products(modes, out_modes):
    """Multiply-adds of a linear layer whose modes have (size, rank), rank None without a factor.

    Returns those of a row through the chain and of the weight; every chain goes mode after mode in the cheapest order
    (`reference.mode_order` says why it is that).
    """
    down = [(n, n if r is None else r) for n, r in modes]
    up = [(r, n) for n, r in down]
    factored = [r is not None for _, r in modes]
    row = _products(down[out_modes:], factored[out_modes:]) + _products(up[:out_modes], factored[:out_modes])
    return row + math.prod([r for r, _ in up]), _products(up, factored)  # lists: torch.compile traces them


@functools.lru_cache(1024)
def project_linear_gradient(rows, modes, out_modes):
    """Which sides' bases of a linear layer to apply to its weight gradient rather than to every row: (output, input).

    With the fewest multiply-adds; neither on a tie.
    """
    products = _linear_gradient_products(rows, modes, out_modes)
    return min(products, key=products.get)


@functools.lru_cache(1024)
def keep_projections(rows, sizes, ranks):
    """Whether a linear layer of two modes is to keep x V and dy U for its gradient in bases [U|U₂] and [V|V₂].

    They leave the products with U₂ and V₂ and the new blocks of the gradient. Kept where that is at most three quarters
    of the multiply-adds of the cheapest order without them, because they take memory. All pairs are (output, input).
    """
    grown = [min(2 * r, n) for n, r in zip(sizes, ranks)]
    left = sum(n * (a - r) for n, r, a in zip(sizes, ranks, grown)) + math.prod(grown) - math.prod(ranks)
    return rows * left <= 0.75 * min(_linear_gradient_products(rows, tuple(zip(sizes, grown)), 1).values())


def _linear_gradient_products(rows, modes, out_modes):
    """Multiply-adds of a linear layer's core gradient for each choice of `project_linear_gradient`."""
    sides = [
        [(n, n if r is None else r, r is not None) for n, r in side] for side in (modes[:out_modes], modes[out_modes:])
    ]
    n_out, n_in = [math.prod([n for n, *_ in side]) for side in sides]  # lists: torch.compile traces them
    r_out, r_in = [math.prod([r for _, r, _ in side]) for side in sides]
    out, into = [_products([(n, r) for n, r, _ in side], [factored for *_, factored in side]) for side in sides]

    def products(late):
        if all(late):
            return rows * n_out * n_in + min(n_in * out + r_out * into, n_out * into + r_in * out)
        late_out, late_in = late
        seen = (n_out if late_out else r_out) * (n_in if late_in else r_in)
        return rows * seen + (r_in if late_out else rows) * out + (r_out if late_in else rows) * into

    return {late: products(late) for late in itertools.product((False, True), repeat=2)}


def _products(changes, factored):
    """Multiply-adds of a chain of products, each changing a mode's size from the first to the second."""
    sizes, total = [before for before, _ in changes], 0
    multiplied = [i for i, has_factor in enumerate(factored) if has_factor]
    for k in mode_order(sizes, [changes[i][::-1] for i in multiplied], multiplied, False):
        i = multiplied[k]
        total += math.prod(sizes) * changes[i][1]
        sizes[i] = changes[i][1]
    return total


def _path_seconds(conv, paths, **how):
    return {path: seconds(path, conv, **how) for path in paths}


_expected = functools.lru_cache(4096)(_path_seconds)
_linear_products = functools.lru_cache(1024)(linear_products)


# Multiply-adds of a forward pass from which the chain of a layer with two modes takes less time in one call of our CPU
# kernel than as three products of torch: with a backward pass 1.06 to 1.4 times as fast from 2^24 on, 0.75 to 1.1 times
# at 2^21, 0.7 times at 2^17. One Zen 4 core, float32.
ONE_CALL = 1 << 24


def choose_linear(rows, modes, out_modes):
    """The path with the fewest multiply-adds for a linear layer: "chain", the first on a tie, or "reconstruct"."""
    row, weight = _counted(modes, out_modes)
    return "chain" if rows * row <= weight + rows * math.prod([n for n, _ in modes]) else "reconstruct"


def in_one_call(rows, modes, out_modes):
    """Whether the chain of a layer with two modes should be one operator."""
    return rows * _counted(modes, out_modes)[0] >= ONE_CALL


def _counted(modes, out_modes):
    count = linear_products if torch.compiler.is_dynamo_compiling() else _linear_products
    return count(modes, out_modes)


def choose(conv, paths=PATHS, previous=None, **how):
    """The path with the least expected time; the first on a tie. `how`: arguments of `seconds`.

    `previous`, the path in use, stays unless another is expected to be a tenth faster: ranks that move to and fro
    do not make the path do the same.
    """
    cached = how.get("machine") is None and not torch.compiler.is_dynamo_compiling()
    times = (_expected if cached else _path_seconds)(conv, paths, **how)
    best = paths[0]
    for path in paths:  # not min with a key, which torch.compile refuses for symbolic sizes
        if times[path] < times[best]:
            best = path
    if previous in times and times[best] > (1 - HYSTERESIS) * times[previous]:
        return previous
    return best
