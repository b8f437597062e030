"""Everything that needs a GPU, in one command: `make gpu-check`, or `--device cpu` as a rehearsal of this harness.

Stages: build, tests with marker gpu, compute-sanitizer, times. A stage that fails is reported and the others go on; the
exit status is the number of failed stages. Times are medians of device events against torch.linalg called matrix by
matrix, which is what a literal step does; the ceilings are measured in the same run. Results go to bench/results/.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUDGET = 450  # seconds for everything
PYTEST = ["-p", "no:cacheprovider", "--maxfail=20", "--continue-on-collection-errors"]


def run(command, timeout):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{os.environ.get('PYTHONPATH', '')}"}
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=environment, timeout=timeout)


def build(_):
    """CMake straight from the tree: the machine may reach no package index."""
    import pybind11

    folder = ROOT / "build/gpu"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DTK_CUDA=ON"]
    run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options], 60)
    run(["cmake", "--build", folder, "--target", "_C"], 240)
    run(["cmake", "--install", folder, "--prefix", ROOT, "--component", "python"], 30)


def tests(_):
    run([sys.executable, "-m", "pytest", "-m", "gpu", "tests", "--tb=short", *PYTEST], 200)


def sanitizer(_):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "no compute-sanitizer on PATH"
    chosen = ["tests/test_cuda_operators.py", "-k", "cuda and (cross_gram or not_finite)", "-m", "gpu"]
    run([tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *chosen, *PYTEST], 150)
    return "clean"


def layers(fraction, quick):
    """(n_out, n_in, window) of a ResNet18's convolutions, and their ranks."""
    shapes = [(64, 64)] * 4 + [(128, 64)] + [(128, 128)] * 3 + [(256, 128)] + [(256, 256)] * 3
    shapes += [(512, 256)] + [(512, 512)] * 3
    shapes = [(16, 16), (32, 16)] if quick else shapes
    return [((m, n), (int(m * fraction), int(n * fraction))) for m, n in shapes]


def median_seconds(function, device, repeats):
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device, quick):
    """What this device does at its best on one product and one copy."""
    n = 256 if quick else 4096
    out = {}
    for dtype in (torch.float32, torch.float64):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out[f"{dtype} FLOP/s".removeprefix("torch.")] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, device, 5)
    x = torch.empty(2**20 if quick else 2**28, device=device)
    out["bytes/s"] = 2 * 4 * x.numel() / median_seconds(lambda: x.clone(), device, 5)
    return out


def benchmark(device, fraction, quick):
    import tucker_kernels as tk

    bases, directions, cores = [], [], []
    for sizes, ranks in layers(fraction, quick):
        for n, r in zip(sizes, ranks):
            bases.append(torch.linalg.qr(torch.randn(n, r, device=device))[0].contiguous())
            directions.append(torch.randn(n, r, device=device))
        cores.append(torch.randn(2 * ranks[0], 2 * ranks[1], 3, 3, device=device))

    def literal_tangent():
        for u, d in zip(bases, directions):
            torch.linalg.qr(torch.cat([u, d], 1))

    def literal_truncation():
        for core in cores:
            for mode in (0, 1):
                torch.linalg.svd(core.movedim(mode, 0).flatten(1), full_matrices=False)

    def batched_by_padding():
        n, r = max(b.shape[0] for b in bases), max(b.shape[1] for b in bases)
        padded = torch.zeros(len(bases), n, 2 * r, device=device)
        for i, (u, d) in enumerate(zip(bases, directions)):
            padded[i, : u.shape[0], : 2 * u.shape[1]] = torch.cat([u, d], 1)
        torch.linalg.qr(padded)

    repeats = 3 if quick else 10
    rows = {
        "tangent_basis": lambda: tk.tangent_basis(bases, directions),
        "hosvd_truncate": lambda: tk.hosvd_truncate(cores, tol=0.1, modes=(0, 1)),
        "torch.linalg.qr, one by one": literal_tangent,
        "torch.linalg.qr, padded": batched_by_padding,
    }
    out = {name: median_seconds(function, device, repeats) for name, function in rows.items()}
    out["torch.linalg.svd, one by one"] = median_seconds(literal_truncation, device, 1)
    flops = sum(2 * 6 * u.shape[0] * u.shape[1] ** 2 + 2 * 2 * u.shape[0] * u.shape[1] ** 2 for u in bases)
    return {"seconds": out, "tangent_basis FLOP": flops}


def times(arguments):
    device, quick = torch.device(arguments.device), arguments.quick
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu (a rehearsal, not a result)",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__,
        "ceilings": ceilings(device, quick),
        "steps": {},
    }
    for divisor in (8, 4, 2):
        result["steps"][f"n/{divisor}"] = benchmark(device, 1 / divisor, quick)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_check-{result['date'].replace(':', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"{result['card']}, {result['commit'][:9]}, milliseconds"]
    lines.append(f"{'':32}" + "".join(f"{k:>10}" for k in result["steps"]))
    for name in result["steps"]["n/4"]["seconds"]:
        lines.append(f"{name:32}" + "".join(f"{1e3 * s['seconds'][name]:10.3f}" for s in result["steps"].values()))
    rate = result["ceilings"]["float32 FLOP/s"]
    floors = (1e3 * s["tangent_basis FLOP"] / rate for s in result["steps"].values())
    lines.append(f"{'floor of tangent_basis (float32)':32}" + "".join(f"{ms:10.3f}" for ms in floors))
    return "\n".join([*lines, f"written to {path}"])


STAGES = {"build": build, "tests": tests, "sanitizer": sanitizer, "times": times}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the harness")
    parser.add_argument("--out", default=str(ROOT / "bench/results"))
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        arguments.stages = [s for s in arguments.stages if s == "times"]
    start, reports, failed = time.monotonic(), {}, []
    for name in arguments.stages:
        if time.monotonic() - start > BUDGET:
            reports[name], failed = "not run: out of time", [*failed, name]
            continue
        try:
            reports[name] = STAGES[name](arguments) or "passed"
        except Exception as error:
            traceback.print_exc()
            reports[name], failed = f"FAILED: {type(error).__name__}: {error}", [*failed, name]
    print()
    for name, report in reports.items():
        print(f"[{name}] {report}")
    print(f"{len(reports) - len(failed)} stages passed, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
