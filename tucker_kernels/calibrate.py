"""`python -m tucker_kernels calibrate`: measures the constants of `cost_model` on this machine and keeps them.

A few layers of all kinds are timed by every path, forward and backward, with one thread and with torch's number; the
constants are those whose expected times have the least logarithmic error. Other work on the machine spoils them.
"""

import dataclasses
import math
import statistics
import time

import torch

from tucker_kernels import cost_model
from tucker_kernels.convolution import tucker_conv


def _layer(batch, n_in, n_out, r_in, r_out, size, window, stride=1):
    out = -(-size // stride)
    return cost_model.Conv(
        *(batch, n_out, n_in, r_out, r_in), *((n, n) for n in (size, out, window, stride, window // 2, 1))
    )


# From launches to arithmetic, ranks from a sixteenth to all of the channels.
LAYERS = (
    _layer(1, 16, 16, 2, 2, 5, 1),
    _layer(1, 24, 24, 8, 8, 9, 3),
    _layer(4, 32, 64, 16, 24, 12, 3, 2),
    _layer(16, 24, 24, 6, 6, 24, 3),
    _layer(16, 48, 48, 12, 12, 20, 1),
    _layer(4, 64, 64, 48, 48, 16, 3),
    _layer(16, 96, 96, 16, 16, 16, 3),
    _layer(1, 128, 128, 16, 16, 24, 3),
    _layer(8, 128, 128, 96, 96, 10, 1),
    _layer(8, 192, 96, 64, 48, 10, 3),
    _layer(2, 256, 256, 32, 32, 12, 3, 2),
    _layer(16, 256, 384, 96, 128, 6, 1),
    _layer(4, 320, 320, 160, 160, 6, 3),
    _layer(24, 384, 384, 48, 48, 4, 3),
    _layer(2, 512, 512, 384, 384, 5, 1),
    _layer(1, 512, 768, 64, 96, 8, 3),
)


def layer_run(path, conv, dtype, training=False):
    """A function that runs one layer: forward, or forward and backward."""
    x = torch.randn(conv.batch, conv.n_in, *conv.size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    core = torch.randn(*conv.ranks, *conv.window, dtype=dtype) / (conv.ranks[1] * math.prod(conv.window)) ** 0.5
    factors = [
        None if r is None else torch.randn(n, r, dtype=dtype) / n**0.5
        for n, r in ((conv.n_out, conv.r_out), (conv.n_in, conv.r_in))
    ]
    operands = [x, core, *(factor for factor in factors if factor is not None)]
    for operand in operands:
        operand.requires_grad_(training)
    geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "path": path}

    def run():
        y = tucker_conv(x, core, [*factors, None, None], **geometry)
        if training:
            torch.autograd.grad(y, operands, y.detach())

    return run


def fit(samples, dtype):
    """The constants per path that explain measured times best.

    Args:
        samples: (path, conv, training, threads, seconds) each, at least one of every path.

    Returns: {path: Rates}, of the least sum of Huber losses of log(expected / measured). Constants that the samples do
    not determine, such as those of several threads where one was used, stay at the shipped ones.
    """
    return {
        path: _fit([sample[1:] for sample in samples if sample[0] == path], path, dtype) for path in cost_model.PATHS
    }


def _fit(samples, path, dtype):
    def column(value):
        return torch.tensor([value(*sample) for sample in samples], dtype=torch.float64)

    size = cost_model.BYTES[dtype]
    passes = column(lambda conv, training, threads, seconds: 3 if training else 1)
    operations = column(lambda conv, training, threads, seconds: cost_model.operations(path, conv) / threads)
    moved = column(lambda conv, training, threads, seconds: cost_model.memory(path, conv, size))
    several = column(lambda conv, training, threads, seconds: threads > 1) > 0
    measured = column(lambda conv, training, threads, seconds: seconds).log()
    shipped = dataclasses.astuple(cost_model.DEFAULTS[dtype][path])
    logs = torch.tensor(shipped, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        rate, bandwidth, forward, training, team = logs.exp()
        calls = torch.where(passes > 1, training, forward) * torch.where(several, team, 1.0)
        expected = passes * (operations / rate + moved / bandwidth) + calls
        error = torch.nn.functional.huber_loss(expected.log(), measured, delta=0.3)
        optimizer.zero_grad()
        error.backward()
        return error

    optimizer.step(loss)
    return cost_model.Rates(*logs.exp().tolist())


def _seconds(run, repeats=7, least=0.0005):
    run()
    start = time.perf_counter()
    run()
    count = max(1, math.ceil(least / (time.perf_counter() - start)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            run()
        samples.append((time.perf_counter() - start) / count)
    return statistics.median(samples)


def measure(dtypes=tuple(cost_model.DEFAULTS)):
    """The constants: {dtype: {path: Rates}}."""
    before = torch.get_num_threads()
    found = {}
    try:
        for name in dtypes:
            samples = []
            for threads in sorted({1, before}):
                torch.set_num_threads(threads)
                for conv in LAYERS:
                    for path in cost_model.PATHS:
                        for training in (False, True):
                            spent = _seconds(layer_run(path, conv, getattr(torch, name), training))
                            samples.append((path, conv, training, threads, spent))
            found[name] = fit(samples, name)
    finally:
        torch.set_num_threads(before)
    return found
