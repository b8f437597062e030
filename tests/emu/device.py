"""The CUDA back end on host memory: its wrappers, bindings, launch plans and kernels, over the executor of csrc/emu."""

import ctypes

from emu import emulator
from tucker_kernels import cuda, dispatch, native


class Emulated:
    """Stands for the compiled module: NAME_cuda calls the C function tk_NAME_cuda of the emulator's library."""

    def __getattr__(self, name):
        bound = getattr(native.native_module()[0], f"{name}_at")
        function = ctypes.cast(getattr(emulator.library(), f"tk_{name}"), ctypes.c_void_p).value

        def call(*args):
            try:
                return bound(function, *args)
            finally:
                emulator.check()  # the executor's own words, where it stopped the launch

        return call


def install(monkeypatch):
    """Until the end of the test, operators on host tensors go to the emulated CUDA back end."""
    monkeypatch.setattr(cuda, "_C", Emulated())
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("cuda", "reference"))
    monkeypatch.setitem(dispatch.DEVICES, "cuda", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_usable", lambda name: name in ("cuda", "reference"))
