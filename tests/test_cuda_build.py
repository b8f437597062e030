"""Every CUDA kernel compiles for sm_80 and sm_90a without spills, and takes what the table says.

The table is cuda_resources.json; `python tests/cuda_resources.py` writes it anew. Numbers are compared when nvcc is the
version that the table was made with; limits always.
"""

import re

import cuda_resources
import pytest
import torch

from tucker_kernels.native import native_module

pytestmark = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="nvcc is not on PATH")

EXPECTED = cuda_resources.expected()
# Most threads of a block, as csrc/kernels/limits.h has them.
LIMITS = dict(re.findall(r"(\w+_threads) = (\d+)", (cuda_resources.ROOT / "csrc/kernels/limits.h").read_text()))
REGISTERS = 65536  # of a multiprocessor, on every architecture since sm_50


@pytest.fixture(scope="module")
def measured():
    return cuda_resources.parse(cuda_resources.compile_all())


def threads(kernel):
    stem = kernel.split("<")[0]
    names = {"grouped_gemm": "gemm_threads", "project_out": "projection_threads", "triangular_product": "gram_threads"}
    return int(LIMITS.get(names.get(stem, f"{stem}_threads"), 256))


@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
def test_kernels_have_no_spills_and_fit_a_block(measured, architecture):
    kernels = measured[architecture]
    assert set(kernels) == set(EXPECTED[architecture]), "run `python tests/cuda_resources.py` and review the table"
    for name, found in kernels.items():
        assert found["spills"] == 0, name
        assert found["shared"] <= 48 * 1024, f"{name}: static shared memory"
        assert found["registers"] * threads(name) <= REGISTERS, name


@pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)
def test_resources_are_those_of_the_table(measured, architecture):
    if cuda_resources.version() != EXPECTED["nvcc"]:
        pytest.skip(f"the table was made with nvcc {EXPECTED['nvcc']}")
    assert measured[architecture] == EXPECTED[architecture], "run `python tests/cuda_resources.py` and review the table"


@pytest.mark.long
def test_no_other_architecture_spills():
    measured = cuda_resources.parse(cuda_resources.compile_all(cuda_resources.OTHERS))
    assert set(measured) == set(cuda_resources.OTHERS)
    spills = {(a, name): found["spills"] for a, kernels in measured.items() for name, found in kernels.items()}
    assert not {key: count for key, count in spills.items() if count}


def test_a_spill_would_be_seen():
    report = """ptxas info    : Compiling entry function '_ZN2tk12grouped_gemmIdEEvPKNS_11GemmProblemIT_EE' for 'sm_80'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 35048 bytes smem, 380 bytes cmem[0]"""
    kernel = cuda_resources.parse(report)["sm_80"]["grouped_gemm<double>"]
    assert kernel == {"stack": 8, "spills": 16, "registers": 255, "shared": 35048}


def compiled():
    module, reason = native_module()
    if module is None or not hasattr(module, "cuda_architectures"):
        pytest.skip(reason or "this build has no CUDA kernels")
    return module


def test_without_a_card_the_module_says_so_in_the_words_of_cuda():
    module = compiled()
    if torch.cuda.is_available():
        pytest.skip("asks what happens without a GPU")
    driver = "no CUDA-capable device is detected|driver version is insufficient"
    assert re.search(f"^loading the kernels: .*({driver})", module.cuda_unusable())
    with pytest.raises(RuntimeError, match=f"^tangent_basis_cuda: the current device: .*({driver})"):
        module.tangent_basis_cuda(0, 0, 0, 0, 0, 0, 0)


def test_what_has_a_plan_can_be_launched():
    names = [name.removesuffix("_plan") for name in dir(compiled()) if name.endswith("_cuda_plan")]
    assert names
    assert not [name for name in names if not hasattr(compiled(), name)]


def test_the_module_says_what_it_was_compiled_for():
    module = compiled()
    assert re.fullmatch(r"\d+[af]?( \d+[af]?)*", module.cuda_architectures())
