// With module_cuda.cpp the only files that know Python: pybind11 bindings over tucker_kernels.h. Pointers
// arrive as integers (tensor.data_ptr()); shapes, dtypes and devices were checked by tucker_kernels/cpu.py
// and cuda.py.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "tucker_kernels.h"

namespace py = pybind11;

namespace {

void check(tk_status status, const char* what) {
  if (status != TK_OK) throw std::runtime_error(std::string(what) + ": " + tk_status_string(status));
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cuda(py::module_& m);  // module_cuda.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tucker-kernels; see csrc/include/tucker_kernels.h.";
  m.attr("version") = TK_VERSION;
  m.attr("compiler") = TK_COMPILER;
  m.attr("cpu_isas") = TK_CPU_ISAS;
  m.attr("cuda_decision") = TK_CUDA_DECISION;
  m.def("cpu_isa", &tk_cpu_isa);
  bind_cuda(m);

  m.def("mode_dot_cpu", [](int dtype, uintptr_t x, int64_t outer, int64_t n, int64_t inner, uintptr_t matrix,
                           int64_t rows, bool transpose, uintptr_t y, int threads) {
    py::gil_scoped_release release;
    check(tk_mode_dot_cpu(static_cast<tk_dtype>(dtype), pointer<const void>(x), outer, n, inner,
                          pointer<const void>(matrix), rows, transpose, pointer<void>(y), threads),
          "mode_dot");
  });
}
