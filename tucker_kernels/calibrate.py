"""`python -m tucker_kernels calibrate`: measures the constants of `cost_model` on this machine and keeps them.

Each rate is what a typical layer (128 channels, 16×16 pixels, rank 32) reaches after its bytes and launches are taken
off, so that the model agrees with the measurement where it was made. One thread.
"""

import dataclasses
import statistics
import time

import torch

from tucker_kernels import cost_model
from tucker_kernels.convolution import tucker_conv

LAYER = cost_model.Conv(8, 128, 128, 32, 32, (16, 16), (16, 16), (3, 3), (1, 1), (1, 1), (1, 1))
TINY = dataclasses.replace(LAYER, batch=1, n_out=8, n_in=8, r_out=8, r_in=8, size=(1, 1), out_size=(1, 1))


def _seconds(call, repeats=15):
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _call(path, conv, dtype):
    x = torch.randn(conv.batch, conv.n_in, *conv.size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    core = torch.randn(conv.r_out, conv.r_in, *conv.window, dtype=dtype)
    factors = [torch.randn(n, r, dtype=dtype) for n, r in ((conv.n_out, conv.r_out), (conv.n_in, conv.r_in))]

    def call():
        with torch.no_grad():
            tucker_conv(x, core, [*factors, None, None], padding=1, path=path)

    return call


def measure():
    """Constants per dtype."""
    source = torch.empty(1 << 24, dtype=torch.uint8)
    target = torch.empty_like(source)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bandwidth = 2 * source.numel() / _seconds(lambda: target.copy_(source))
        found = {}
        for name in cost_model.DEFAULTS:
            dtype = getattr(torch, name)
            tiny = {path: _seconds(_call(path, TINY, dtype), 200) for path in ("chain", "fused")}
            launches = {"launch": tiny["chain"] / 3, "fused_launch": tiny["fused"]}
            fixed = {"chain": tiny["chain"], "fused": tiny["fused"], "reconstruct": 4 * launches["launch"]}
            rates = {}
            for path in cost_model.PATHS:
                moved = cost_model.memory(path, LAYER, cost_model.BYTES[name]) / bandwidth
                spent = _seconds(_call(path, LAYER, dtype))
                # At least a tenth of the time is arithmetic, whatever was disturbed meanwhile.
                rates[path] = cost_model.operations(path, LAYER) / max(spent - moved - fixed[path], spent / 10)
            found[name] = cost_model.Rates(
                chain=rates["chain"],
                fused=rates["fused"],
                dense=rates["reconstruct"],
                bandwidth=bandwidth,
                **launches,
            )
    finally:
        torch.set_num_threads(threads)
    return found
