"""The Triton convolution kernels on a GPU, layer by layer, against what one would run instead.

    python bench/triton_kernels.py [--nets cifar imagenet vgg] [--precisions bf16 tf32 fp32] [--divisors 4]
                                   [--budget 150] [--compile] [--save]

Layers: the 3×3 convolutions of ResNet18 on CIFAR (batch 128) and ImageNet (batch 256) and of VGG16 (batch 64), ranks
r = n/4 unless told. Forward and backward (all five gradients). Rivals: the chain of three cuDNN convolutions in
channels-last, one dense convolution, and `torch.compile` of the chain (--compile; forward). Every candidate is captured
in a CUDA graph, so launch costs of Python count for none of them, and they take turns.

A row is timed only after its results agree with float64 on the same rounded operands. Bytes and operations are those of
`tucker_kernels/triton/costs.py`; the ceilings they are compared with are measured here first. Rows for which the time
budget leaves nothing are named at the end, not dropped.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import torch

from tucker_kernels import backends, reference
from tucker_kernels.triton import costs

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

F = torch.nn.functional
GEOMETRY = ([1, 1], [1, 1], [1, 1])
NEED = [True] * 5


@dataclass(frozen=True)
class Layer:
    net: str
    batch: int
    channels: int
    size: int
    divisor: int = 4

    @property
    def rank(self):
        return self.channels // self.divisor

    @property
    def pixels(self):
        return self.batch * self.size**2

    def __str__(self):
        return f"{self.net} {self.channels}@{self.size}² r{self.rank}"


NETS = {
    "cifar": [("R18 CIFAR", 128, n, s) for n, s in ((64, 32), (128, 16), (256, 8), (512, 4))],
    "imagenet": [("R18 ImageNet", 256, n, s) for n, s in ((64, 56), (128, 28), (256, 14), (512, 7))],
    "vgg": [("VGG16", 64, n, s) for n, s in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))],
}
# dtype, allow TF32 in the rivals and the library's products, precision of our products, gate relative to float64.
# TF32 keeps 11 bits: 3e-3 allows for the three products of the chain and the gradients' sums.
PRECISIONS = {
    "bf16": (torch.bfloat16, False, None, None),
    "tf32": (torch.float32, True, "tf32", 3e-3),
    "fp32": (torch.float32, False, None, None),
}
RESULTS = ("y", "dx", "dcore", "dU_out", "dU_in", "dbias")


def operands(layer, dtype, device, batch=None):
    """Input, core, both factors, bias and the gradient of the output; entries of variance about one or less."""
    generator = torch.Generator(device).manual_seed(0)
    n, r, s = layer.channels, layer.rank, layer.size
    shapes = [((batch or layer.batch, n, s, s), 1), ((r, r, 3, 3), 9 * r), ((n, r), r), ((n, r), n), ((n,), 1)]
    made = [torch.randn(shape, generator=generator, device=device) / v**0.5 for shape, v in shapes]
    x, core, out_factor, in_factor, bias = (t.to(dtype) for t in made)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, core, out_factor, in_factor, bias, torch.randn_like(x)


def run_ours(x, core, out_factor, in_factor, bias, grad, precision):
    """(forward, backward) as functions without arguments, both with kept intermediates."""
    from tucker_kernels.triton import operators

    products = {"input_precision": precision}
    args = (core, out_factor, in_factor)
    forward = lambda: operators.tucker_conv_forward(x, *args, bias, *GEOMETRY, "fused", True, **products)  # noqa: E731
    _, z, t = forward()
    return forward, lambda: operators.tucker_conv_backward(
        grad, x, z, t, *args, *GEOMETRY, NEED, "fused", **products
    )  # fmt: skip


def run_chain(x, core, out_factor, in_factor, bias, grad):
    args = (core, out_factor, in_factor)
    forward = lambda: reference.tucker_conv_forward(x, *args, bias, *GEOMETRY, "chain", True)  # noqa: E731
    _, z, t = forward()
    return forward, lambda: reference.tucker_conv_backward(grad, x, z, t, *args, *GEOMETRY, NEED, "chain")


def run_dense(x, core, out_factor, in_factor, bias, grad):
    weight = torch.einsum("abhw,oa,ib->oihw", *(t.float() for t in (core, out_factor, in_factor))).to(x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    forward = lambda: (F.conv2d(x, weight, bias, padding=1),)  # noqa: E731
    rest = ([weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    return forward, lambda: torch.ops.aten.convolution_backward(grad, x, weight, *rest)


def run_compiled(x, core, out_factor, in_factor, bias):
    weights = [in_factor.T[:, :, None, None], core, out_factor[:, :, None, None]]
    weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]

    @torch.compile(dynamic=False)
    def chain(x, first, middle, last, bias):
        return F.conv2d(F.conv2d(F.conv2d(x, first), middle, padding=1), last, bias)

    return lambda: chain(x, *weights, bias)


def gate(layer, name, device):
    """The largest error of any of our results, relative to float64, over what is allowed; and which result it is."""
    from tolerances import TOLERANCES

    dtype, _, precision, allowed = PRECISIONS[name]
    given = operands(layer, dtype, device, batch=min(layer.batch, 4))
    forward, backward = run_ours(*given, precision)
    exact_forward, exact_backward = run_chain(*(t.double() for t in given))
    pairs = zip(RESULTS, (forward()[0], *backward()), (exact_forward()[0], *exact_backward()))
    worst = (0.0, "")
    for result, got, want in pairs:
        bound = allowed or TOLERANCES["tucker_conv" if result == "y" else "tucker_conv_backward"][dtype]
        error = float((got.double() - want).abs().max() / want.abs().max()) / bound
        worst = max(worst, (error if error == error else float("inf"), result))
    return worst


def layer_costs(layer, size):
    """(forward, backward) costs of our kernels and the library's products around them."""
    P, n, r = layer.pixels, layer.channels, layer.rank
    pair = costs.tucker_core_expand(P, P, n, r, r, (3, 3), size, save=True)
    accumulate = costs.project_accumulate(P, n, 0, r, size)
    backward = costs.project_accumulate(P, n, r, r, size) + pair + accumulate
    return costs.product(P, n, r, size) + pair, backward + costs.rank_space_wgrad(P, P, r, r, (3, 3), size)


def graph_times(candidates, repeats=7, target=2e-3):
    """Median seconds of one call of each, captured in CUDA graphs, taking turns."""
    graphs = {}
    for name, call in candidates.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            count = max(1, min(20, int(target / (time.perf_counter() - start))))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        graphs[name] = (graph, count)
    samples = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, (graph, count) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e-3 / count)
    return {name: statistics.median(values) for name, values in samples.items()}


def ceilings(name):
    """(bytes per second of a copy, operations per second of a large product), measured on this device."""
    dtype = PRECISIONS[name][0]
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    times = graph_times({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, repeats=5)
    return 2 * source.numel() / times["copy"], 2 * 8192**3 / times["product"]


def measure(layer, name, limits, compiled):
    """The rows of one layer and precision: forward and backward."""
    dtype, _, precision, _ = PRECISIONS[name]
    given = operands(layer, dtype, "cuda")
    runs = {"ours": run_ours(*given, precision), "chain": run_chain(*given), "dense": run_dense(*given)}
    rows = []
    for i, direction in enumerate(("forward", "backward")):
        candidates = {rival: run[i] for rival, run in runs.items()}
        if compiled and direction == "forward":
            candidates["compiled"] = run_compiled(*given[:5])
        times = graph_times(candidates)
        cost = layer_costs(layer, dtype.itemsize)[i]
        ours = times["ours"]
        rows.append(
            {"layer": str(layer), "precision": name, "direction": direction}
            | {f"{rival} µs": 1e6 * t for rival, t in times.items()}
            | {"ours/chain": ours / times["chain"], "ours/dense": ours / times["dense"]}
            | {"GB/s": 1e-9 * cost.bytes / ours, "TFLOP/s": 1e-12 * cost.flops / ours}
            | {"% of copy": 100 * cost.bytes / ours / limits[0], "% of product": 100 * cost.flops / ours / limits[1]}
        )
    return rows


def refusal():
    """Why nothing can be timed here, in one sentence; empty where it can."""
    available, reason = backends()["triton"]
    if available and torch.cuda.is_available():
        return ""
    return f"bench/triton_kernels.py needs a GPU with Triton: {reason if not available else 'torch sees none'}."


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--divisors", nargs="+", type=int, default=[4], help="ranks n/d, for each d")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds; what is left out is named")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the chain (slow to start)")
    parser.add_argument("--save", action="store_true", help="write bench/results/triton_kernels.json")
    options = parser.parse_args(argv)
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 2
    start, rows, wrong, left_out = time.monotonic(), [], [], []
    layers = [Layer(*sizes, d) for net in options.nets for sizes in NETS[net] for d in options.divisors]
    for name in options.precisions:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = PRECISIONS[name][1]
        limits = ceilings(name)
        print(f"{name}: copy {1e-9 * limits[0]:.0f} GB/s, product {1e-12 * limits[1]:.1f} TFLOP/s")
        for layer in layers:
            if time.monotonic() - start > options.budget:
                left_out.append(f"{layer} {name}")
                continue
            error, result = gate(layer, name, "cuda")
            if error > 1:
                wrong.append(f"{layer} {name}: {result} is off by {error:.2g} times what is allowed")
                continue
            rows += measure(layer, name, limits, options.compile)
            if options.save:  # whatever ends this before its time
                harness.save("triton_kernels", rows, left_out=left_out, wrong=wrong)
            torch.cuda.empty_cache()
    for direction in ("forward", "backward"):
        if part := [row for row in rows if row["direction"] == direction]:
            harness.print_table(part, title=f"Triton kernels, {direction}, {torch.cuda.get_device_name()}")
            for name in options.precisions:
                ratios = [row["ours/chain"] for row in part if row["precision"] == name]
                if ratios:
                    print(f"{name} {direction}: ours/chain {statistics.geometric_mean(ratios):.2f} (geometric mean)")
    if left_out:
        print(f"not run within {options.budget:.0f} s: {', '.join(left_out)}")
    for line in wrong:
        print(f"WRONG {line}")
    if options.save and rows:
        print(harness.save("triton_kernels", rows, left_out=left_out, wrong=wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
