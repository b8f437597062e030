"""Each CUDA kernel of a ResNet18 step's linear algebra on a GPU, against its roofline.

    python bench/gpu_kernels.py [--budget 40] [--rows FILE] [--dry-run]

Times are the profiler's, kernel by kernel, at ranks n/4. The roofline is the larger of two times: leading operations at
the measured rate of a large product in the kernel's arithmetic, and bytes read and written once at the measured rate of
a copy. Cholesky and Jacobi run one block per matrix and are bound by latency: expect a few per cent. Jacobi is counted
with one sweep.
"""

import sys

import gpu_step
import torch
from gpu_device import Rows, arguments, opened, plans

DOUBLE = ("gram", "triangular_product", "semidefinite_cholesky", "finish_truncation")


def ceilings(card, tiny):
    """(float32 FLOP/s, float64 FLOP/s, bytes/s)."""
    n = 64 if tiny else 4096
    rates = []
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / card.seconds(lambda a=a, b=b: a @ b))
    x = torch.ones(2**10 if tiny else 2**28)
    return *rates, 2 * 4 * x.numel() / card.seconds(lambda: x.clone())


def cost(kernel, p, size):
    """(operations, bytes) of one problem, in elements of `size` bytes."""
    if kernel == "grouped_gemm":
        return 2 * p["m"] * p["n"] * p["depth"], size * (p["m"] * p["depth"] + p["depth"] * p["n"] + p["m"] * p["n"])
    if kernel == "project_out":
        return 4 * p["passes"] * p["n"] * p["r"] * p["cols"], size * p["n"] * (p["r"] + 2 * p["cols"])
    if kernel == "gram":
        return p["size"] * (p["size"] + 1) * p["depth"], size * p["size"] * p["depth"] + 8 * p["size"] ** 2
    if kernel == "triangular_product":
        return p["m"] * p["n"] ** 2, 2 * size * p["m"] * p["n"] + 8 * p["n"] ** 2
    if kernel == "semidefinite_cholesky":
        return 2 * p["size"] ** 3 / 3, 16 * p["size"] ** 2
    if kernel == "jacobi_svd":
        return 3 * p["size"] ** 3, 2 * size * p["size"] ** 2
    return 0, 8 * p.get("tiles", 0)


def measure(card, operator, call, rates, rows):
    single, double, bandwidth = rates
    ((_, dtype, plan),) = plans(call, card)
    everything = card.kernels(call)
    if not everything:
        rows.add("note", text=f"{operator}: the profiler saw no kernel, so there are no times of single ones")
        return
    ran = [(name, seconds) for name, seconds in everything if "tk::" in name and "store_table" not in name]
    expected = [launch["kernel"] for launch in plan["launches"]]
    if len(ran) != len(expected) or any(kernel not in name for kernel, (name, _) in zip(expected, ran)):
        rows.add(
            "wrong", text=f"{operator}: the profiler saw {[name[:40] for name, _ in ran]}, planned were {expected}"
        )
        return
    rows.add(
        "note",
        text=f"{operator}: {sum('tk::' in name for name, _ in everything)} of ours in {len(everything)} launches",
    )
    for launch, (_, seconds) in zip(plan["launches"], ran):
        size = 8 if dtype else 4
        costs = [cost(launch["kernel"], p, size) for p in launch["problems"]]
        flops, moved = (sum(c[i] for c in costs) for i in (0, 1))
        rate = double if dtype or launch["kernel"] in DOUBLE else single
        roofline = max(flops / rate, moved / bandwidth)
        rows.add(
            "kernel", name=launch["kernel"], operator=operator, ranks="n/4", seconds=seconds, roofline=roofline
        )  # fmt: skip


def main(argv=None):
    options = arguments(__doc__, argv)
    rows = Rows(options.rows, options.budget)
    with torch.no_grad(), opened(options.dry_run) as card:
        torch.manual_seed(0)
        layers = gpu_step.layers_of(4, options.dry_run)
        cores = gpu_step.grown(layers)
        calls = {
            "tangent_basis": lambda: gpu_step.augment(layers),
            "hosvd_truncate": lambda: gpu_step.truncate(layers, cores),
        }
        rates = ceilings(card, options.dry_run)
        text = f"measured: {1e-12 * rates[0]:.1f} and {1e-12 * rates[1]:.1f} TFLOP/s, {1e-9 * rates[2]:.0f} GB/s"
        rows.add("note", text=f"{text} (float32, float64, copy)")
        for operator, call in calls.items():
            if rows.time_is_up():
                rows.add("note", text=f"no time left for the kernels of {operator}")
            else:
                measure(card, operator, call, rates, rows)


if __name__ == "__main__":
    sys.exit(main())
