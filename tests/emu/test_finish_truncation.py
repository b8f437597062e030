"""The device kernel `finish_truncation` where it cuts a rank, at the end of a truncation, in all thread orders."""

import pytest
import test_hosvd_truncate
import torch
from matrix_families import infeasible_cores

import tucker_kernels as tk
from emu import device, emulator


@pytest.mark.sanitize
@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_rank_above_the_product_of_the_others_is_cut(dtype, order, monkeypatch):
    device.install(monkeypatch)
    emulator.set_thread_order(order)
    core = infeasible_cores(0.2)["middle"].to(dtype)
    (new,), (projections,), ranks, error = tk.hosvd_truncate([core], tol=0.2)
    test_hosvd_truncate.check(core, (new, projections, ranks[0].tolist(), float(error[0])), tol=0.2)
