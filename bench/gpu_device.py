"""What bench/gpu_step.py and bench/gpu_kernels.py need of a device: a card, or the CPU that stands in for one."""

import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch


class Card:
    """A CUDA device: times are those of events and of the profiler, never of the host."""

    device = torch.device("cuda")
    repeats = 10

    def seconds(self, call, slow=1.0):
        """Median of several calls; of one call where the first took longer than `slow` seconds."""
        first = self._once(call)
        if first > slow:
            return first
        return statistics.median(self._once(call) for _ in range(self.repeats))

    @staticmethod
    def _once(call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    @staticmethod
    def captured(call):
        """(replay, what the captured call returned): the call in a CUDA graph, after two calls on a side stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph.replay, results

    @staticmethod
    def kernels(call):
        """[(name, seconds)] of the kernels of one call in the order they ran, by torch's profiler."""
        call()
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            call()
            torch.cuda.synchronize()
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.start)
        return [(e.name, e.time_range.elapsed_us() * 1e-6) for e in events]

    @staticmethod
    def plan_arguments():
        """What a launch plan must know: multiprocessors, and shared memory of a block."""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return found.multi_processor_count, found.shared_memory_per_block_optin


class Stand:
    """The CPU with the kernels in the host executor: for rehearsals."""

    device = torch.device("cpu")
    repeats = 1

    def seconds(self, call, slow=1.0):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @staticmethod
    def captured(call):
        return call, call()

    @staticmethod
    def kernels(call):
        """As the card would name them; the executor does not say how long each took."""
        found = []
        for *_, plan in plans(call, Stand):
            found += [("tk::store_table", 1e-6), *((f"tk::{p['kernel']}", 1e-6) for p in plan["launches"])]
        return found

    @staticmethod
    def plan_arguments():
        return 2, 101376


def plans(call, card):
    """[(operator, dtype code, launch plan)] of what the call runs on the CUDA back end."""
    from tucker_kernels import cuda

    found, compiled = [], cuda._C

    class Recorder:
        def __getattr__(self, name):
            def run(dtype, *arguments):
                *problems, workspace, _, _ = arguments
                if workspace:
                    plan = getattr(_module(), f"{name}_plan")(dtype, *problems, workspace, *card.plan_arguments())
                    found.append((name.removesuffix("_cuda"), dtype, plan))
                return getattr(compiled, name)(dtype, *arguments)

            return run

    cuda._C = Recorder()
    try:
        call()
    finally:
        cuda._C = compiled
    return found


def _module():
    from tucker_kernels.native import native_module

    module, reason = native_module()
    if module is None:
        raise RuntimeError(reason)
    return module


@contextlib.contextmanager
def opened(dry_run):
    """The device to measure on. A card whose CUDA back end cannot run is an error, not a fallback."""
    if dry_run:
        import pytest
        from emu import device as emulated

        with pytest.MonkeyPatch.context() as patch:
            emulated.install(patch)
            yield Stand()
        return
    import tucker_kernels

    available, reason = tucker_kernels.backends()["cuda"]
    if not available:
        raise RuntimeError(f"the cuda back end cannot run: {reason}")
    torch.set_float32_matmul_precision("highest")  # rivals in float32, as ours
    with torch.device("cuda"):
        yield Card()


class Rows:
    """Results as lines of a file, each written when it is known; and the time that is left."""

    def __init__(self, path, budget):
        self._path, self._end = path, time.monotonic() + budget

    def time_is_up(self):
        return time.monotonic() > self._end

    def add(self, kind, **fields):
        line = json.dumps({"kind": kind, **fields})
        print(line, flush=True)
        if self._path is not None:
            with Path(self._path).open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())


def arguments(description, argv=None):
    import argparse

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny sizes; numbers mean nothing")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds; what is left out is named")
    parser.add_argument("--rows", help="file that gets a line of JSON per result")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)
