"""Everything that needs a GPU, in one command that ends within eight minutes: `make gpu-check`.

    python3 bench/gpu_check.py [--stages build tests …] [--out bench/results] [--commit …] [--dry-run]

What is worth most comes first: build, tests with marker gpu; times of a step's linear algebra for all layers of a
ResNet18 (bench/gpu_step.py), of whole training steps as CUDA graphs (bench/gpu_model.py), of each kernel against its
roofline (bench/gpu_kernels.py); compute-sanitizer; the Triton kernels (bench/triton_kernels.py). Every stage is a
process of its own with a share of the time, to which comes what earlier ones left. What it measured before its deadline
is kept, and what there was no time for is named. Results go to bench/results/gpu_check-DATE.json after every stage, so
that a cut loses nothing; the table comes last, and the exit status is the number of failed stages and of results found
wrong. Needs torch, pytest, pybind11, cmake, ninja and nvcc, and no network.

`--dry-run` runs the Python of every stage on this machine's CPU with tiny sizes, the CUDA back end being the host
executor of csrc/emu: a rehearsal of this harness, whose numbers mean nothing.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
BUDGET = 460  # seconds for everything: the shares of STAGES together
LEAST = 5  # seconds without which a stage does not begin
# pyproject.toml's options are for plugins that may be missing here.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--tb=short"]
# The tests that a GPU adds. Named, because others import packages that such a machine may lack.
CUDA_TESTS, TRITON_TESTS = "tests/test_cuda_operators.py", "tests/test_triton.py"


def toolkits():
    """Folders in which CUDA's tools may be: nvcc's own, those that the environment names, and the usual one."""
    nvcc = shutil.which("nvcc")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    return list(dict.fromkeys(str(root / folder) for root in roots for folder in ("bin", "compute-sanitizer")))


def environment():
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *toolkits()])
    paths = [str(ROOT), str(ROOT / "python"), str(BENCH), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def run(command, deadline):
    """Ends the command and whatever it started at the deadline. Raises CalledProcessError or TimeoutExpired."""
    command = [str(part) for part in command]
    print("$", *command, flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        status = process.wait(max(deadline - time.monotonic(), 0.1))
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def architecture():
    """This GPU's own: one architecture builds several times faster than the default list."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def build(arguments, deadline):
    """CMake straight from the tree: the machine may reach no package index."""
    import pybind11

    folder = ROOT / ("build/gpu-dry" if arguments.dry_run else "build/gpu")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    if arguments.dry_run:
        run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options, "-DTK_CUDA=OFF"], deadline)
        return "configured only"
    found = architecture()
    options += ["-DTK_CUDA=ON", *([f"-DCMAKE_CUDA_ARCHITECTURES={found}"] if found else [])]
    run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options], deadline)
    run(["cmake", "--build", folder, "--target", "_C"], deadline)
    run(["cmake", "--install", folder, "--prefix", ROOT, "--component", "python"], deadline)
    return f"for {found}"


def tests_of(file):
    def stage(arguments, deadline):
        run([*PYTEST, "-m", "gpu", "--maxfail=20", *(["--collect-only"] if arguments.dry_run else []), file], deadline)
        return "collected only" if arguments.dry_run else None

    return stage


def sanitizer(arguments, deadline):
    path = environment()["PATH"]
    tool = shutil.which("compute-sanitizer", path=path)
    chosen = ["-k", "cuda and (cross_gram or not_finite or product_of_the_others)", CUDA_TESTS]
    if arguments.dry_run:
        run([*PYTEST, "--collect-only", "-m", "gpu", *chosen], deadline)
        return "collected only"
    if tool is None:
        return f"not run: no compute-sanitizer in {path}"
    # Torch's cache would hide what lies beyond an allocation, and torch probes for features that fail.
    prefix = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    clean = []
    for check in ("memcheck", "racecheck"):
        try:
            run([*prefix, "--tool", check, *PYTEST, "-m", "gpu", *chosen], deadline)
        except subprocess.TimeoutExpired:
            if not clean:
                raise
            return f"{clean[0]} is clean, no time for {check}"
        clean.append(check)
    return "memcheck and racecheck are clean"


def measured(script):
    def stage(arguments, deadline):
        options = ["--dry-run"] if arguments.dry_run else []
        options += ["--budget", f"{max(deadline - time.monotonic() - 3, 1):.0f}", "--rows", arguments.rows]
        run([sys.executable, BENCH / script, *options], deadline)

    return stage


def triton(arguments, deadline):
    budget = max(deadline - time.monotonic() - 10, 1)  # one layer more may be under way
    options = ["--nets", "cifar", "--precisions", "bf16", "tf32", "--budget", f"{budget:.0f}", "--save"]
    result = BENCH / "results/triton_kernels.json"
    if arguments.dry_run:
        run([sys.executable, BENCH / "triton_kernels.py", "--help"], deadline)
        return "imported only"
    began = time.time()
    try:
        run([sys.executable, BENCH / "triton_kernels.py", *options], deadline)
    finally:  # it is written layer by layer; an older one is not this run's
        if result.exists() and result.stat().st_mtime >= began and arguments.rows.parent != result.parent:
            shutil.copy(result, arguments.rows.parent)
    return "rows in triton_kernels.json"


# In the order they run, with each one's share of the time in seconds.
STAGES = {
    "build": (build, 110),
    "tests": (tests_of(CUDA_TESTS), 60),
    "step": (measured("gpu_step.py"), 60),
    "model": (measured("gpu_model.py"), 40),
    "kernels": (measured("gpu_kernels.py"), 20),
    "triton_tests": (tests_of(TRITON_TESTS), 50),
    "sanitizer": (sanitizer, 80),
    "triton": (triton, 40),
}


def machine(dry_run, commit):
    import torch

    card = "none: a rehearsal on the CPU, not a result"
    if not dry_run:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU found"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    if commit is None and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    commit = commit or "unknown"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "card": card, "commit": commit, "torch": torch.__version__, "cuda": torch.version.cuda}


def read_rows(path):
    """A last line that a killed process left unfinished is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write(path, about, reports, rows):
    """The result as far as it is known; the rows that are in it."""
    found = read_rows(rows)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**about, "stages": reports, "rows": found}, indent=1) + "\n")
    temporary.replace(path)
    return found


def table(rows):
    """Milliseconds of a step's linear algebra by rank and of whole steps, and each kernel with its roofline."""
    lines = []
    steps = [r for r in rows if r["kind"] == "step"]
    if steps:
        ranks = list(dict.fromkeys(r["ranks"] for r in steps))
        lines.append(f"{'linear algebra of a ResNet18 step, ms':46}" + "".join(f"{r:>10}" for r in ranks))
        for name in dict.fromkeys(r["name"] for r in steps):
            found = {r["ranks"]: f"{1e3 * r['seconds']:.3f}" for r in steps if r["name"] == name}
            lines.append(f"{name:46}" + "".join(f"{found.get(r, '-'):>10}" for r in ranks))
    trained = [r for r in rows if r["kind"] == "model"]
    if trained:
        lines.append(f"{'one training step, ms':46}{'eager':>10}{'graph':>10}")
        for name in dict.fromkeys(r["name"] for r in trained):
            found = {r["how"]: f"{1e3 * r['seconds']:.3f}" for r in trained if r["name"] == name}
            lines.append(f"{name:46}" + "".join(f"{found.get(how, '-'):>10}" for how in ("eager", "CUDA graph")))
    kernels = [r for r in rows if r["kind"] == "kernel"]
    if kernels:
        lines.append(
            f"{'kernels at ' + kernels[0]['ranks']:30}{'operator':>16}{'µs':>10}{'roofline µs':>13}{'of it':>8}"
        )
        for r in kernels:
            share = f"{r['roofline'] / r['seconds']:7.1%}" if r["seconds"] else "-"
            lines.append(
                f"{r['name']:30}{r['operator']:>16}{1e6 * r['seconds']:10.1f}{1e6 * r['roofline']:13.2f}{share:>8}"
            )
    return lines + [f"{r['kind']}: {r['text']}" for r in rows if r["kind"] in ("note", "wrong")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="every stage's Python on the CPU, tiny sizes")
    parser.add_argument("--commit", help="where the tree has no git history: what it is")
    parser.add_argument("--out", default=str(BENCH / "results"))
    arguments = parser.parse_args(argv)
    start, reports, failed = time.monotonic(), {}, []
    sys.path.insert(0, str(ROOT))
    about = machine(arguments.dry_run, arguments.commit)
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu_check-{about['date'].replace(':', '')}.json"
    arguments.rows = path.with_suffix(".rows")
    deadline = start
    try:
        for name in arguments.stages:
            stage, share = STAGES[name]
            deadline = min(deadline + share, start + BUDGET)
            began = time.monotonic()
            if deadline - began < LEAST:
                reports[name] = "not run: out of time"
                continue
            reports[name] = "begun, and cut off"  # what the file says if this process ends here
            write(path, about, reports, arguments.rows)
            try:
                reports[name] = stage(arguments, deadline) or "passed"
            except subprocess.TimeoutExpired:
                reports[name], failed = f"FAILED: not done after {deadline - began:.0f} s", [*failed, name]
            except Exception as error:
                reports[name], failed = f"FAILED: {type(error).__name__}: {error}", [*failed, name]
            reports[name] += f" ({time.monotonic() - began:.0f} s)"
    finally:
        rows = write(path, about, reports, arguments.rows)
    wrong = sum(r["kind"] == "wrong" for r in rows)
    arguments.rows.unlink(missing_ok=True)
    print(f"\n{about['card']}, commit {about['commit']}, torch {about['torch']}, written to {path}")
    print(*table(rows), *(f"[{name}] {report}" for name, report in reports.items()), sep="\n")
    print(f"{len(reports) - len(failed)} stages ended well, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    if wrong:
        print(f"results found wrong: {wrong}")
    return len(failed) + wrong


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the stage's process ends, too
    sys.exit(main())
