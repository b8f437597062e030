"""CUDA errors in launch.cu: ours name the kernel and are taken away, others are neither reported nor cleared."""

import ctypes

import pytest
import torch

import tucker_kernels as tk
from emu import device, emulator
from tucker_kernels import cuda

ILLEGAL_ADDRESS = 700  # left behind by somebody else


@pytest.fixture
def library(monkeypatch):
    device.install(monkeypatch)
    library = emulator.library()
    library.tk_cuda_error.restype = ctypes.c_char_p
    yield library
    library.tk_emu_fail_after(-1)
    library.tk_emu_exchange_error(0)


def tangent_basis(n):
    """One direction of length n."""
    (tangent,), kept = tk.tangent_basis([torch.empty(n, 0)], [torch.ones(n, 1)])
    return int(kept), tangent


def test_an_error_that_was_there_before_is_not_ours(library):
    library.tk_emu_exchange_error(ILLEGAL_ADDRESS)
    kept, tangent = tangent_basis(16)
    assert kept == 1
    assert torch.allclose(tangent, torch.tensor(0.25))
    assert library.tk_emu_exchange_error(0) == ILLEGAL_ADDRESS, "whoever made it has yet to find it"


LAUNCHES = ["store_table", "project_out", *["gram", "semidefinite_cholesky", "triangular_product"] * 2]
ALLOWED = ["store_table", "project_out", *LAUNCHES[1:]]  # the memory for a strip of 1,400 rows has to be asked for


@pytest.mark.parametrize(("n", "calls"), [(16, LAUNCHES), (1400, ALLOWED)])
def test_a_refused_call_names_its_kernel_and_what_cuda_says(n, calls, library):
    for k, name in enumerate(calls):
        library.tk_emu_fail_after(k)
        with pytest.raises(RuntimeError, match=r"tangent_basis: a CUDA call failed"):
            tangent_basis(n)
        assert library.tk_cuda_error().decode() == f"{name}: invalid argument"
        assert library.tk_emu_exchange_error(0) == 0, "nobody else may find it"
    library.tk_emu_fail_after(len(calls))
    assert tangent_basis(n)[0] == 1


class OneByteLess(device.Emulated):
    """Says after every call that the workspace has one byte less."""

    def __getattr__(self, name):
        call = super().__getattr__(name)

        def short(*given):
            call(*given)
            ctypes.c_int64.from_address(given[-2]).value -= 1

        return short


def test_a_workspace_that_is_too_small_is_refused(library, monkeypatch):
    monkeypatch.setattr(cuda, "_C", OneByteLess())
    with pytest.raises(RuntimeError, match="out of range"):
        tangent_basis(16)
