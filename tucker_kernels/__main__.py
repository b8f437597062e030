"""`python -m tucker_kernels`: what is installed here, what was built, which back ends can run, and why not."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tucker_kernels
from tucker_kernels import calibrate, cost_model
from tucker_kernels.native import native_module


def diagnosis() -> dict:
    """Everything the report says, as plain data."""
    return {
        "versions": {
            "tucker_kernels": tucker_kernels.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": _build(),
        "backends": {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in tucker_kernels.backends().items()
        },
        "threads": _threads(),
        "advice": _advice(),
    }


def _build():
    module, problem = native_module()
    if module is None:
        return {"module": None, "problem": problem}
    return {
        "module": module.__file__,
        "version": module.version,
        "compiler": module.compiler,
        "cpu_isas": module.cpu_isas.split(),
        "cpu_isa": module.cpu_isa(),
        "openmp": module.openmp,
        "cuda_decision": module.cuda_decision,
        "cuda_architectures": module.cuda_architectures() if hasattr(module, "cuda_architectures") else None,
    }


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _openmp_runtimes():
    """The OpenMP libraries in this process; more than one means more than one pool of threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split()[-1] for line in lines if "/" in line}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))


def _threads():
    return {
        "torch": torch.get_num_threads(),
        "cores": _cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "openmp_runtimes": _openmp_runtimes(),
    }


def _advice():
    module, problem = native_module()
    advice = []
    if module is None:
        advice.append(f"Only the reference back end can run: {problem}.")
    elif module.version != tucker_kernels.__version__:
        advice.append(
            f"The compiled module is of version {module.version}, the package of {tucker_kernels.__version__}: "
            "reinstall, so that both are from one source tree."
        )
    if torch.get_num_threads() > _cores():
        advice.append(
            f"torch uses {torch.get_num_threads()} threads on {_cores()} cores: torch.set_num_threads({_cores()})."
        )
    if module is not None and not module.openmp:
        advice.append(
            "The compiled module was built without OpenMP, so its CPU kernels use one thread: install OpenMP for the "
            "compiler (libomp-dev for clang++), or set CXX to one that has it, and reinstall."
        )
    if len(_openmp_runtimes()) > 1:
        advice.append(
            "More than one OpenMP runtime is loaded, and their threads compete: import torch before anything else "
            "that brings its own."
        )
    if torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        advice.append(
            "Where other processes use the same cores, set OMP_WAIT_POLICY=PASSIVE before Python starts: OpenMP "
            "threads otherwise spin while they wait, and a call of microseconds takes milliseconds."
        )
    return advice


def report(console: Console) -> None:
    """Prints `diagnosis` for people."""
    found = diagnosis()

    def rows(title, pairs):
        table = Table(title=f"[bold cyan]{title}", title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in pairs:
            table.add_row(name, escape(str(value)))
        console.print(table, "")

    rows("Versions", found["versions"].items())
    build = found["build"]
    if build["module"] is None:
        rows("Compiled module", [("missing", build["problem"])])
    else:
        rows(
            "Compiled module",
            [
                ("file", build["module"]),
                ("compiler", build["compiler"]),
                ("CPU", f"{', '.join(build['cpu_isas'])} compiled; {build['cpu_isa']} in use"),
                ("CUDA", build["cuda_architectures"] or f"not compiled ({build['cuda_decision']})"),
            ],
        )
    marks = {True: "can run", False: "cannot run"}
    rows("Back ends", [(name, f"{marks[b['available']]}: {b['reason']}") for name, b in found["backends"].items()])
    threads = found["threads"]
    rows(
        "Threads",
        [
            ("torch", f"{threads['torch']} on {threads['cores']} cores"),
            *((name, threads[name] or "not set") for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")),
            ("OpenMP", "\n".join(threads["openmp_runtimes"]) or "unknown"),
        ],
    )
    for sentence in found["advice"]:
        console.print(f"[bold]Advice:[/] {escape(sentence)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tucker_kernels", description="Says what was built, which back ends can run here, and why not."
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["calibrate"],
        help="measure the constants that choose between paths on this machine (seconds), and keep them",
    )
    options = parser.parse_args(arguments)
    if options.command == "calibrate":
        print(cost_model.save(calibrate.measure()))
    elif options.json:
        print(json.dumps(diagnosis(), indent=2))
    else:
        report(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
