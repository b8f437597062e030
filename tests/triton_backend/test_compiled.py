"""Every row of the configuration table, compiled for sm_90 without a GPU: shared memory, spills, tensor cores.

The launchers run as they are, on tensors without storage; only the launch itself is replaced by a compilation.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tucker_kernels.triton import configs, ordered_sum
from tucker_kernels.triton import project_accumulate as project_module
from tucker_kernels.triton import rank_space_wgrad as wgrad_module
from tucker_kernels.triton import tucker_core_expand as core_module
from tucker_kernels.triton import tucker_linear as linear_module

SHARED_LIMIT = 232_448  # bytes a program may ask for on sm_90
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {"half": torch.bfloat16, "tf32x3": torch.float32, "ieee": torch.float32, "tf32": torch.float32}


class NoDevice(DriverBase):
    """Stands in for the CUDA driver so that kernels compile for Hopper on a machine without a GPU."""

    is_active = classmethod(lambda cls: True)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("nothing is launched here")

    get_benchmarker = map_python_to_cpp_type


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """The kernels that the launchers of a test ask for, compiled."""
    found = []

    def compile_only(kernel, grid, like, *args, **options):
        found.append(kernel.warmup(*args, grid=grid, **options))

    for module in (core_module, project_module, wgrad_module, linear_module, ordered_sum):
        monkeypatch.setattr(module, "launch", compile_only)
    triton.runtime.driver.set_active(NoDevice())
    return found


def check(kernel, tmp_path, most_spilled=0):
    """Asserts the resources of a compiled kernel and returns its PTX."""
    assert kernel.metadata.shared <= SHARED_LIMIT
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert stack <= most_spilled, f"{stack} bytes of registers spilled"
    assert registers <= 255
    return kernel.asm["ptx"]


def tensor_cores(ptx, kind, wgmma=True):
    if kind == "ieee":
        assert "mma" not in ptx, "ieee products must not be made of TF32 ones"
    else:
        assert ("wgmma.mma_async" if wgmma else "mma") in ptx


def meta(*shape, dtype):
    tensor = torch.empty(*shape, dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def core_expand(kind, rank, pixels=1 << 18, transposed=False, stride=1, channels=None, save=True, **options):
    dtype, side = DTYPES[kind], max(8, int((pixels / 64) ** 0.5))
    channels = channels or rank
    z = meta(64, channels, side, side, dtype=dtype)
    core = meta(*((channels, rank) if transposed else (rank, channels)), 3, 3, dtype=dtype)
    size = (side * stride, side * stride) if transposed else None
    factor, bias = meta(4 * rank, rank, dtype=dtype), meta(4 * rank, dtype=dtype)
    core_module.tucker_core_expand(
        *(z, core, factor, None if transposed else bias, (stride, stride), (1, 1)),
        transposed_size=size, save_intermediate=save, input_precision=None if kind == "half" else kind, **options,
    )  # fmt: skip


CORE_ROWS = [(kind, limit) for kind, rows in configs._CORE_EXPAND.items() for limit, *_ in rows]
CORE_CASES = [
    # The slowest to compile are in the grid below as well.
    pytest.param(kind, limit, what, marks=pytest.mark.long if kind in ("ieee", "tf32") and what != "many" else ())
    for kind, rows in configs._CORE_EXPAND.items()
    for limit, many, few in rows
    for what in ("many", "few", "data gradient")
    if what != "few" or few != many
]


@pytest.mark.parametrize(("kind", "rank", "what"), CORE_CASES)
def test_core_expand_rows(kind, rank, what, compiled, tmp_path):
    stride = 2 if what == "data gradient" else 1
    core_expand(kind, rank, 4096 if what == "few" else 1 << 18, stride == 2, stride)
    ptx = check(compiled[0], tmp_path)
    tensor_cores(ptx, kind)
    assert "cp.async.cg.shared.global" in ptx, "the loads are not asynchronous 16-byte copies"


@pytest.mark.parametrize("rank", [24, 120])
def test_ranks_that_are_multiples_of_8_are_copied_16_bytes_at_a_time(rank, compiled, tmp_path):
    core_expand("half", rank)
    ptx = check(compiled[0], tmp_path)
    assert "cp.async.cg.shared.global" in ptx
    assert "cp.async.ca" not in ptx


def test_odd_ranks_compile_but_spill_a_little(compiled, tmp_path):
    core_expand("half", 63, transposed=True, stride=2)
    check(compiled[0], tmp_path, most_spilled=2048)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "limit"), CORE_ROWS)
@pytest.mark.parametrize("transposed", [False, True])
def test_core_expand_grid(kind, limit, transposed, compiled, tmp_path):
    # A sample of ranks, channels, pixels and strides: all of them together are an hour of compilation.
    for rank in (limit, limit - 8):
        for channels, pixels, stride in ((24, 4096, 1), (256, 1 << 18, 2)):
            core_expand(kind, rank, pixels, transposed, stride, channels)
    core_expand(kind, limit, 1 << 27, transposed)  # 64-bit offsets
    # Some FFMA kernels between the rows' own sizes spill a few registers (32 bytes were seen).
    for kernel in compiled:
        tensor_cores(check(kernel, tmp_path, 64 if kind == "ieee" else 0), kind)


def test_three_tf32_products_are_three(compiled, tmp_path):
    config = configs.tucker_core_expand("tf32x3", 64, 64, 1 << 18)
    counts = {}
    for kind in ("tf32", "tf32x3"):
        core_expand(kind, 64, config=config)
        counts[kind] = check(compiled[-1], tmp_path).count("wgmma.mma_async")
    assert counts["tf32x3"] == 3 * counts["tf32"] > 0


def test_long_images_use_64_bit_offsets(compiled, tmp_path):
    """The wide variant multiplies offsets in 64 bits; the narrow one never does."""
    core_expand("half", 64)
    core_expand("half", 64, pixels=1 << 27)
    narrow, wide = (check(k, tmp_path) for k in compiled)
    assert "mul.lo.s64" not in narrow
    assert "mul.lo.s64" in wide or "mul.wide.s32" in wide


PROJECT_ROWS = [(k, *limits) for k, rows in configs._PROJECT_ACCUMULATE.items() for limits, _ in rows]


@pytest.mark.parametrize(("kind", "columns", "rank"), PROJECT_ROWS)
def test_project_accumulate_rows(kind, columns, rank, compiled, tmp_path):
    a, basis, other = (meta(*s, dtype=DTYPES[kind]) for s in ((1 << 17, columns), (columns, rank), (1 << 17, rank)))
    project_module.project_accumulate(a, basis, other, input_precision=None if kind == "half" else kind)
    tensor_cores(check(compiled[0], tmp_path), kind, wgmma=kind == "half")
    check(compiled[1], tmp_path)  # the second stage


@pytest.mark.parametrize(("kind", "rank"), [(k, limit) for k, rows in configs._ACCUMULATE.items() for limit, _ in rows])
def test_accumulate_rows(kind, rank, compiled, tmp_path):
    a, other = meta(1 << 17, 1024, dtype=DTYPES[kind]), meta(1 << 17, rank, dtype=DTYPES[kind])
    project_module.project_accumulate(a, None, other, input_precision=None if kind == "half" else kind)
    tensor_cores(check(compiled[0], tmp_path), kind)


WGRAD_ROWS = [(k, limit) for k, rows in configs._WGRAD.items() for limit, *_ in rows]


@pytest.mark.parametrize(("kind", "limit"), WGRAD_ROWS)
def test_rank_space_wgrad_rows(kind, limit, compiled, tmp_path):
    rank = limit or 256
    z, d = ([meta(64, rank, 32, 32, dtype=DTYPES[kind]) for _ in range(2)] for _ in range(2))
    known = meta(rank, rank, 3, 3, dtype=DTYPES[kind])
    arguments = (z, d, (3, 3), (1, 1), (1, 1))
    precision = None if kind == "half" else kind
    wgrad_module.rank_space_wgrad(*arguments, known=known, input_precision=precision)
    ptx = check(compiled[0], tmp_path)
    tensor_cores(ptx, kind, wgmma=rank >= 64)  # a block of 64 rows is the least that wgmma takes
    assert "cp.async" in ptx


def test_rank_space_wgrad_with_ranks_of_one(compiled, tmp_path):
    """Triton makes a constant of an argument that is 1, which must not change the type of what is chosen."""
    for a, c in ((1, 1), (1, 5), (7, 1)):
        z, d = ([meta(2, r, 8, 8, dtype=torch.bfloat16), meta(2, 1, 8, 8, dtype=torch.bfloat16)] for r in (c, a))
        wgrad_module.rank_space_wgrad(z, d, (3, 3))
    for kernel in compiled:
        check(kernel, tmp_path)


@pytest.mark.parametrize(("kind", "rank"), [(k, limit) for k, rows in configs._LINEAR.items() for limit, _ in rows])
def test_tucker_linear_rows(kind, rank, compiled, tmp_path):
    dtype, n = DTYPES[kind], 4 * rank
    shapes = ((8192, n), (rank, rank), (n, rank), (n, rank))
    linear_module.tucker_linear(
        *(meta(*s, dtype=dtype) for s in shapes), meta(n, dtype=dtype),
        save_intermediate=True, input_precision=None if kind == "half" else kind,
    )  # fmt: skip
    tensor_cores(check(compiled[0], tmp_path), kind)
