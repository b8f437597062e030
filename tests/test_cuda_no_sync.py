"""The wrappers of the CUDA back end never read a value from the device.

They run on tensors of the `meta` device, which hold no data: `.item()`, `.cpu()`, `bool(tensor)` and shapes by data
raise there. The compiled module is replaced by the launch plans, which are host functions.
"""

import ctypes

import pytest
import torch

from tucker_kernels import cuda, dispatch
from tucker_kernels.dispatch import implementation
from tucker_kernels.native import native_module

_C, _reason = native_module()
pytestmark = pytest.mark.skipif(_C is None, reason=_reason)


class Planned:
    """NAME_cuda(…) answers with the workspace that the plan needs and launches nothing."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*given):
            *problems, _, size_at, _ = given
            self.calls.append(name)
            plan = getattr(_C, f"{name}_plan")(*problems, 0, 132, 232448)
            ctypes.c_int64.from_address(size_at).value = plan["workspace"]

        return call


def tensors(*shapes):
    return [torch.randn(*shape, device="meta") for shape in shapes]


CALLS = {
    "mode_dot": lambda: (*tensors((4, 5, 6), (3, 5)), 1, False),
    "multi_mode_dot": lambda: (tensors((4, 5))[0], tensors((2, 4), (3, 5)), [0, 1], False),
    "cross_gram": lambda: (*tensors((4, 5, 6), (4, 3, 6)), 1),
    "tangent_basis": lambda: (tensors((9, 3), (8, 2)), tensors((9, 3), (8, 2))),
    "hosvd_truncate": lambda: (tensors((4, 3), (5,)), [1, 1, 1], [0.1, -1.0], [1] * 3, [2] * 3, False),
    "rotate_bases": lambda: (tensors((9, 4)), tensors((4, 2))),
    "gram_solve": lambda: (tensors((4, 5, 3), (7, 2)), [1, 0], tensors((2, 5), (9, 7))),
    "batched_qr": lambda: (tensors((9, 3), (3, 9)),),
    "batched_svd": lambda: (tensors((9, 3), (3, 9)),),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrappers_read_no_value(name, monkeypatch):
    planned, arguments = Planned(), CALLS[name]()
    monkeypatch.setattr(dispatch, "_usable", lambda back_end: True)
    monkeypatch.setattr(cuda, "_C", planned)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a copy from the host"))
    implementation(name, "cuda")(*arguments)
    assert len(planned.calls) == 2  # the size of the workspace, then the launches


def test_reading_a_value_would_be_seen():
    (x,) = tensors((3,))
    for read in (lambda: x.sum().item(), lambda: x.cpu(), lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
