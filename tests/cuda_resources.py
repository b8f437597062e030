"""What ptxas says of every CUDA kernel, and the table of it: `python tests/cuda_resources.py` writes the table anew.

Only nvcc is needed. A changed number is no error by itself; a look at the difference belongs to the review.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("sm_80", "sm_90a")
OTHERS = ("sm_86", "sm_89", "sm_100", "sm_120")  # the table would only repeat itself


def expected():
    """The table as it stands."""
    return json.loads(TABLE.read_text())


def nvcc():
    return shutil.which("nvcc")


def version():
    text = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def compile_all(architectures=ARCHITECTURES):
    """ptxas's report of csrc/cuda/launch.cu, which includes every kernel, for all the architectures at once."""
    targets = [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in architectures]
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc(), "-std=c++17", "-O3", "-lineinfo", "--threads", "2", *targets, "-Xptxas=-v,--warn-on-spills"]
        command += ["-I", ROOT / "csrc", "-I", ROOT / "csrc/include", '-DTK_CUDA_ARCHITECTURES="test"', "-c"]
        command += [ROOT / "csrc/cuda/launch.cu", "-o", Path(scratch) / "launch.o"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def kernel_name(mangled):
    found = re.match(r"_ZN2tk(\d+)(\w+)", mangled)
    length = int(found.group(1))
    name, rest = found.group(2)[:length], found.group(2)[length:]
    return name + {"If": "<float>", "Id": "<double>"}.get(rest[:2], "")


def parse(report):
    """{architecture: {kernel: {registers, stack, spills, shared, constant}}}, in bytes but for registers."""
    table, kernel = {}, None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = table.setdefault(found.group(2), {}).setdefault(kernel_name(found.group(1)), {})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            kernel.update(stack=stack, spills=stores + loads)
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.update(registers=int(found.group(1)), shared=int(shared.group(1)) if shared else 0)
    return table


def shown(nvcc_version, table):
    """The table as JSON with a line per kernel."""
    parts = [f' "nvcc": {json.dumps(nvcc_version)}']
    for architecture, kernels in sorted(table.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(kernels[name], sort_keys=True)}" for name in sorted(kernels)]
        parts.append(f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if nvcc() is None:
        sys.exit("nvcc is not on PATH")
    TABLE.write_text(shown(version(), parse(compile_all())))
    print(f"wrote {TABLE}")
