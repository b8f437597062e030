"""Turns the environment into CMake flags and runs CMake. What is compiled, and how, is CMakeLists.txt's business.

Read from the environment: TK_CUDA (AUTO, ON, OFF), TORCH_CUDA_ARCH_LIST, MAX_JOBS, TK_BUILD_DIR and CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self):
        import pybind11  # needed to build, not to pack a source distribution

        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = Path(os.environ.get("TK_BUILD_DIR", ROOT / "build" / tag))
        # An editable install leaves the module beside its sources, a wheel in build_lib.
        prefix = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        configure = [
            _tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            # Named each time: in an isolated build both live in a folder that is gone the next time.
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTK_CUDA={os.environ.get('TK_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        _run(configure)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        _run([_tool("cmake"), "--build", str(build), "--parallel", jobs])
        install = [_tool("cmake"), "--install", str(build), "--prefix", str(prefix)]
        _run([*install, "--component", "python"])

    def get_outputs(self):
        return []


def _run(command):
    if subprocess.run(command).returncode:
        raise SystemExit("tucker-kernels: the build failed; the message above says why")


def _tool(name):
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"tucker-kernels: {name} was not found; `pip install {name}` or put it on PATH")
    return path


setup(ext_modules=[Extension("tucker_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
