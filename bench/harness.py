"""What every benchmark here shares: interleaved timing, medians, tables and result files.

    times = harness.compare({"ours": f, "torch": g})        # {name: median seconds}, measured in turns
    rows.append({"shape": "64x64", "ours ms": 1e3 * times["ours"], "ratio": times["torch"] / times["ours"]})
    harness.print_table(rows, title="mode_dot")
    harness.save("mode_dot", rows)                          # bench/results/mode_dot.json

Candidates take turns inside one process, so that a busy machine slows all of them alike: trust the ratios, not the
times. Import this module before torch; it makes OpenMP threads sleep, not spin, while they wait (GOMP_SPINCOUNT=300000
in the environment makes them spin, as they do where nobody sets anything), and malloc keep what is given back: else
every candidate's results of some megabytes come from fresh pages, whose faults cost as much as the arithmetic, and
whether they do depends on what else was allocated before.
"""

import contextlib
import ctypes
import datetime
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if platform.libc_ver()[0] == "glibc":
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, 1 << 30)

import torch

RESULTS = Path(__file__).parent / "results"


def compare(candidates, repeats=15, min_time=0.005, clock=time.perf_counter):
    """Median seconds of one call of each candidate, {name: callable without arguments}.

    Every candidate is called once to warm up and is then timed `repeats` times in turns; a sample repeats a short
    call until it has taken `min_time` seconds. CUDA work is waited for. With one thread and much else running,
    `clock=time.process_time` leaves out the time spent waiting for a core; say so where the result is given.
    """
    counts = {}
    for name, call in candidates.items():
        call()
        once = max(_sample(call, 1, clock), 1e-9)
        counts[name] = max(1, math.ceil(min_time / once))
    samples = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)  # nobody is always the one that runs after a certain other
        for name in order:
            samples[name].append(_sample(candidates[name], counts[name], clock))
    return {name: statistics.median(values) for name, values in samples.items()}


def _sample(call, count, clock):
    _wait()
    start = clock()
    for _ in range(count):
        call()
    _wait()
    return (clock() - start) / count


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(call):
    """How far the bytes of live tensors rise above where they were, while `call` runs.

    Counted from the allocations that torch's profiler reports, so the same in every run; working memory inside a
    kernel of ours is not torch's and is not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(live, default=0)


def held_bytes(model, *optimisers):
    """Bytes of parameters, buffers, gradients and optimiser state between steps."""
    parameters = list(model.parameters())
    kept = [value for own in optimisers for state in own.state.values() for value in state.values()]
    kept = [v for value in kept for v in (value if isinstance(value, list) else [value])]  # momentum outside the bases
    tensors = [*parameters, *model.buffers(), *(p.grad for p in parameters), *kept]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def threads(count):
    """Runs the block with `count` threads in torch and in our kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def geometric_mean(values):
    return statistics.geometric_mean(values)


def print_table(rows, title=None):
    """Prints a list of dictionaries with the same keys; numbers with three significant digits."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title or ''}")
    for line in cells:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]))


def _text(value):
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def machine():
    """Where and with what a result was measured."""
    import tucker_kernels

    described = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "backends": {name: reason for name, (usable, reason) in tucker_kernels.backends().items() if usable},
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _commit():
    """The commit, with "-dirty" where tracked files differ from it; result files are what is being made."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments):
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def result_path(name):
    """bench/results/NAME.json; where threads spin, NAME_spinning.json."""
    return RESULTS / f"{name}{'_spinning' if 'GOMP_SPINCOUNT' in os.environ else ''}.json"


def save(name, rows, **extra):
    """Writes rows, the machine and `extra` to `result_path(name)`, which is returned."""
    RESULTS.mkdir(exist_ok=True)
    path = result_path(name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), **extra, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    return path
