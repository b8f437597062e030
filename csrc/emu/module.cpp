// The CUDA back end on the host, as the Python module `_C_emulated`: the bindings, launch plans and launcher
// that a GPU build has, over the executor. Tests put it in the place of `_C`, with tensors in host memory.
#include <pybind11/pybind11.h>

#include "emu/runtime.h"

void bind_cuda(pybind11::module_& m);

PYBIND11_MODULE(_C_emulated, m) {
  bind_cuda(m);
  m.def("take_error", &emu::take_error);
  m.def("set_thread_order", &emu::set_thread_order);
}
