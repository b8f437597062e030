"""The Triton back end from outside: import without triton, refusals, and the two processes that prove the kernels.

The kernels' own tests are in `tests/triton_backend`; run them alone with

    TK_TRITON=interpret TRITON_INTERPRET=1 python -m pytest tests/triton_backend
    TK_TRITON=compile python -m pytest tests/triton_backend
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tucker_kernels
from tucker_kernels.dispatch import _predicates
from tucker_kernels.triton import configs

ROOT = Path(__file__).parent.parent
HAS_TRITON = importlib.util.find_spec("triton.language") is not None if importlib.util.find_spec("triton") else False


def _start(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "TK_TRITON"))}
    paths = [str(ROOT), str(ROOT / "python"), env.get("PYTHONPATH", "")]
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def _python(*arguments, **environment):
    process = _start(*arguments, **environment)
    output, errors = process.communicate()
    return process.returncode, output, errors


def _kernel_tests(tmp_path, *arguments):
    """Both processes side by side."""
    modes = {"interpret": {"TRITON_INTERPRET": "1"}, "compile": {"TRITON_CACHE_DIR": str(tmp_path)}}
    command = ("-m", "pytest", "tests/triton_backend", "-p", "no:cacheprovider", *arguments)
    started = [
        _start(*command, TK_TRITON=mode, PYTHONWARNINGS="ignore", **environment) for mode, environment in modes.items()
    ]
    for process in started:
        output, errors = process.communicate()
        assert process.returncode == 0, output[-6000:] + errors[-2000:]
        assert " passed" in output


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; the test extra brings it on Linux")


@needs_triton
def test_kernels_in_the_interpreter(tmp_path):
    _kernel_tests(tmp_path)


@needs_triton
@pytest.mark.long
def test_kernels_over_the_full_grid(tmp_path):
    _kernel_tests(tmp_path, "-m", "long")


@pytest.mark.gpu
def test_kernels_on_the_device():
    """The kernels' tests, compiled and run; a process that deterministic algorithms may be asked of."""
    process = _start(
        *("-m", "pytest", "tests/triton_backend", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not long"),
        TK_TRITON="cuda",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
    )
    output, errors = process.communicate()
    assert process.returncode == 0, output[-6000:] + errors[-2000:]


def test_import_does_not_import_triton():
    code = "import sys, tucker_kernels, tucker_kernels.triton; sys.exit('triton' in sys.modules)"
    returncode, _, errors = _python("-c", code)
    assert returncode == 0, errors


def test_without_triton_the_others_work_and_say_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tucker_kernels as tk\n"
        "print(tk.backends()['triton'])\n"
        "print(tk.mode_dot(torch.ones(2, 2), torch.ones(3, 2), 0).sum())\n"
        "tk.use_backend('triton')"
    )
    _, output, errors = _python("-c", code)
    assert "(False, 'triton is not installed; `pip install tucker-kernels[triton]`')" in output
    assert "tensor(12.)" in output
    assert "back end 'triton' cannot run here: triton is not installed" in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@needs_triton
def test_without_a_gpu_the_reason_is_given():
    available, reason = tucker_kernels.backends()["triton"]
    assert not available
    assert "CUDA" in reason


def _forward(dtype=torch.float32, rank=8, ndim=4, path="fused", in_factor=True):
    x, core = torch.empty(2, 16, *[6] * (ndim - 2), dtype=dtype), torch.empty(rank, 8, *[3] * (ndim - 2))
    factors = torch.empty(24, rank), torch.empty(16, 8) if in_factor else None
    return x, core, *factors, None, [1], [1], [1], path, True


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_forward(), ""),
        (_forward(dtype=torch.bfloat16, rank=256), ""),
        (_forward(dtype=torch.float64), "torch.float64, and these kernels have bfloat16, float16 and float32"),
        (_forward(rank=257), "ranks (257, 8), and 256 is the most that a program holds"),
        (_forward(ndim=3), "1 window dimensions, and these kernels have 2"),
        (_forward(path="chain"), "path 'chain', which is left to the library's convolutions"),
        (_forward(in_factor=False), "a channel mode without a factor, so there is no pair to fuse"),
    ],
)
def test_what_is_refused_and_why(call, reason):
    assert _predicates["triton", "tucker_conv_forward"](*call) == reason


def test_images_with_more_pixels_than_an_index_has_bits():
    x = torch.empty(1, 1, 1, 1).expand(2**15, 1, 2**8, 2**8)
    assert "31 bits" in _predicates["triton", "rank_space_wgrad"](x, x, None, None, [1, 1], [1, 1], [0, 0], [1, 1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_the_benchmark_refuses_in_one_sentence():
    returncode, output, errors = _python("bench/triton_kernels.py")
    assert returncode == 2
    assert output == ""
    assert errors.startswith("bench/triton_kernels.py needs a GPU with Triton: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("pixels", [0, 1, 63, 64, 65, 1000, 12_544, 131_072, 3_211_264])
@pytest.mark.parametrize(("tile", "blocks", "size"), [(16, 1, 4096), (128, 9, 1 << 20), (64, 1000, 1 << 26)])
def test_runs_of_pixels_cover_every_pixel(pixels, tile, blocks, size):
    per_run, runs = configs.pixel_splits(pixels, tile, blocks, size)
    assert per_run >= 1
    assert runs >= 1
    assert per_run * runs * tile >= pixels
    assert per_run * (runs - 1) * tile < max(pixels, 1)  # no run is empty
    assert runs == 1 or runs * size <= configs.SPLIT_BYTES
