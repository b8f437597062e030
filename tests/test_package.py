"""The package as users get it: diagnosis, what the module links, the wheel, the sdist, and the C library.

The tests marked `long` build in virtual environments of their own and need pip's index.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import tucker_kernels as tk
from tucker_kernels.native import native_module

ROOT = Path(__file__).parents[1]
NEUTRAL = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDACXX", "CUDA_PATH", "TK_CUDA", "CMAKE_ARGS")
}
in_source_tree = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="lists the files that git tracks")


def run(*command, cwd=None, check=True, **environment):
    """Standard output and error of a command, outside the source tree."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd or "/",
        env={**NEUTRAL, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout if check else (done.returncode, done.stdout)


# ---- what is installed here --------------------------------------------------------------------------------


def diagnose(*arguments, executable=sys.executable, **environment):
    return run(executable, "-m", "tucker_kernels", *arguments, **environment)


SOURCES = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}


def test_diagnosis_as_data():
    found = json.loads(diagnose("--json", TK_ISA="baseline", OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="2", **SOURCES))
    assert found["versions"]["torch"] == torch.__version__
    assert found["build"]["version"] == found["versions"]["tucker_kernels"] == tk.__version__
    assert found["build"]["cpu_isa"] == "baseline"
    assert found["build"]["cpu_isas"][0] == "baseline"
    assert found["threads"]["cores"] >= 1
    assert any("OMP_WAIT_POLICY=PASSIVE" in sentence for sentence in found["advice"])


def test_diagnosis_for_people():
    text = " ".join(diagnose(COLUMNS="200", OMP_WAIT_POLICY="PASSIVE", **SOURCES).split())
    for name, (available, reason) in tk.backends().items():
        assert f"{name} {'can' if available else 'cannot'} run: {reason}" in text
    assert torch.__version__ in text
    assert "OMP_WAIT_POLICY=PASSIVE" not in text


def test_without_the_compiled_module():
    """Import works, the first native call says what is missing, and the reference answers instead."""
    text = run(
        sys.executable,
        "-c",
        "import sys; sys.modules['tucker_kernels._C'] = None\n"
        "import torch, tucker_kernels as tk\n"
        "print(tk.backends()['cpu'])\n"
        "print(tk.mode_dot(torch.eye(2), torch.ones(3, 2), 0).shape)\n"
        "try: tk.use_backend('cpu')\n"
        "except ValueError as error: print('refused:', error)",
        **SOURCES,
    )
    assert "(False, 'the compiled module did not load" in text
    assert "back end cpu is not used: the compiled module did not load" in text
    assert "torch.Size([3, 2])" in text
    assert "refused: name: back end 'cpu' cannot run here: the compiled module did not load" in text


def test_the_module_needs_no_torch():
    """One binary for every torch: it links neither torch nor Python nor a CUDA library."""
    needed = run("readelf", "--dynamic", "--wide", native_module()[0].__file__)
    libraries = [line.split("[")[1].split("]")[0] for line in needed.splitlines() if "(NEEDED)" in line]
    assert libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name or "cuda" in name or "python" in name]


def test_versions_agree():
    assert f'\nversion = "{tk.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"project(tucker_kernels VERSION {tk.__version__} " in (ROOT / "CMakeLists.txt").read_text()


def test_every_package_is_listed():
    """Otherwise it works from the working tree and is missing from the wheel."""
    project = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools]\n")[1]
    (listed,) = re.findall(r"^packages = \[(.*?)\]", project.split("\n[")[0], re.MULTILINE | re.DOTALL)
    found = {
        str(file.parent.relative_to(base)).replace(os.sep, ".")
        for base, top in ((ROOT, "tucker_kernels"), (ROOT / "python", "tdlrt"))
        for file in (base / top).rglob("__init__.py")
    }
    assert set(re.findall('"(.*?)"', listed)) == found


# ---- building ----------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """A copy of what git tracks, so that no build is left behind in the working tree."""
    copy = tmp_path / "sources"
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def path_without_nvcc():
    return os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())


@pytest.fixture
def environment(tmp_path):
    """The Python of a fresh virtual environment that finds the torch of this one, and nothing installed in place."""
    directory = tmp_path / "venv"
    venv.create(directory, with_pip=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    return directory / "bin/python"


def pip(executable, *arguments, cwd=None, **variables):
    return run(executable, "-m", "pip", *arguments, cwd=cwd, PATH=path_without_nvcc(), **variables)


def assert_runs(executable):
    """The installed package runs compiled kernels, and is not the one in the working tree."""
    found = json.loads(diagnose("--json", executable=executable))
    assert found["backends"]["cpu"]["available"], found
    assert not Path(found["build"]["module"]).is_relative_to(ROOT)
    return found


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cuda_asked_for_without_nvcc(tmp_path):
    code, text = run(
        *("cmake", "-S", ROOT, "-B", tmp_path, "-DTK_CUDA=ON", "-DTK_PYTHON=OFF"), check=False, PATH=path_without_nvcc()
    )
    assert code != 0
    assert "TK_CUDA=ON, but no nvcc was found. Install the CUDA toolkit" in " ".join(text.split())


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_without_a_compiler(tmp_path):
    options = ("-DTK_CUDA=OFF", "-DTK_PYTHON=OFF")
    code, text = run("cmake", "-S", ROOT, "-B", tmp_path, *options, check=False, CXX="/no/compiler")
    assert code != 0
    assert "No C++ compiler was found. Install one for C++17 with OpenMP" in " ".join(text.split())


@in_source_tree
@pytest.mark.long
def test_sdist_and_wheel(sources, environment, tmp_path):
    """The wheel is built from the sdist in isolation, without torch and without nvcc, and holds exactly the package."""
    pip(environment, "install", "setuptools>=77")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(environment, "-c", build, cwd=sources)
    (sdist,) = (sources / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"CMakeLists.txt", "LICENSE", "csrc/include/tucker_kernels.h", "csrc/module.cpp"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "build/"))]

    pip(environment, "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name]
    tracked = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    expected = {n.removeprefix("python/") for n in tracked if n.startswith(("tucker_kernels/", "python/tdlrt/"))}
    (module,) = [n for n in names if n.startswith("tucker_kernels/_C.")]
    assert set(names) - {module} == expected

    pip(environment, "install", "--no-deps", wheel)
    found = assert_runs(environment)
    assert found["build"]["cuda_architectures"] is None
    assert "nvcc" in found["build"]["cuda_decision"]


@in_source_tree
@pytest.mark.long
def test_editable_install_twice(sources, environment):
    """The second isolated build finds its tools although those of the first are gone."""
    for _ in range(2):
        pip(environment, "install", "--no-deps", "--editable", ".", cwd=sources)
        assert_runs(environment)


def documented(language):
    """The code block of csrc/README.md in this language."""
    (block,) = re.findall(f"```{language}\n(.*?)```", (ROOT / "csrc/README.md").read_text(), re.DOTALL)
    return block


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_a_c_program_uses_the_library(tmp_path):
    """The one in csrc/README.md, with the shared library from C alone, and with the static one."""
    for shared, languages in (("ON", "C"), ("OFF", "C CXX")):
        prefix, example = tmp_path / f"prefix_{shared}", tmp_path / f"example_{shared}"
        options = ["-DTK_CUDA=OFF", "-DTK_PYTHON=OFF", f"-DBUILD_SHARED_LIBS={shared}"]
        run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options)
        run("cmake", "--build", tmp_path / "build", "--parallel", "2")
        run("cmake", "--install", tmp_path / "build", "--prefix", prefix, "--component", "dev")
        example.mkdir()
        (example / "example.c").write_text(documented("c"))
        (example / "CMakeLists.txt").write_text(documented("cmake").replace("LANGUAGES C", f"LANGUAGES {languages}"))
        run("cmake", "-S", example, "-B", example / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
        run("cmake", "--build", example / "build")
        assert run(example / "build/example") == "success: 4 5 6 5 7 9"
