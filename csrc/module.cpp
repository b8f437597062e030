// With module_cuda.cpp the only files that know Python: pybind11 bindings over tucker_kernels.h. Pointers
// arrive as integers (tensor.data_ptr()); shapes, dtypes and devices were checked by tucker_kernels/cpu.py
// and cuda.py.
#include "module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "tucker_kernels.h"

namespace py = pybind11;

void bind_cuda(py::module_& m);  // module_cuda.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tucker-kernels; see csrc/include/tucker_kernels.h.";
  m.attr("version") = TK_VERSION;
  m.attr("compiler") = TK_COMPILER;
  m.attr("cpu_isas") = TK_CPU_ISAS;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("cuda_decision") = TK_CUDA_DECISION;
  m.def("cpu_isa", &tk_cpu_isa);
  m.def("tile_costs", [] {
    std::array<double, 4> costs;
    return tk_tile_costs_cpu(costs.data()) ? py::cast(costs) : py::none();
  });
  bind_cuda(m);

  bind(m, "mode_dot_cpu", tk_mode_dot_cpu);
  bind(m, "multi_mode_dot_cpu", tk_multi_mode_dot_cpu);
  bind(m, "cross_gram_cpu", tk_cross_gram_cpu);
  bind(m, "tucker_linear_forward_cpu", tk_tucker_linear_forward_cpu);
  bind(m, "tucker_linear_backward_cpu", tk_tucker_linear_backward_cpu);
  bind(m, "tangent_basis_cpu", tk_tangent_basis_cpu);
  bind(m, "rotate_bases_cpu", tk_rotate_bases_cpu);
  bind(m, "gram_solve_cpu", tk_gram_solve_cpu);
  bind(m, "batched_qr_cpu", tk_batched_qr_cpu);
  bind(m, "batched_svd_cpu", tk_batched_svd_cpu);
  bind(m, "hosvd_truncate_cpu", tk_hosvd_truncate_cpu);
  m.attr("max_modes") = static_cast<int>(TK_MAX_MODES);

  // geometry: batch, n_in, n_out, r_in, r_out, then {rows, columns} of size, out_size, window, stride,
  // padding, dilation.
  static const auto conv2d = [](const std::array<int64_t, 17>& g) {
    tk_conv2d conv;
    static_assert(sizeof conv == sizeof g, "tk_conv2d is 17 integers");
    std::memcpy(&conv, g.data(), sizeof conv);
    return conv;
  };
  m.def("tucker_conv_forward_cpu", [](int dtype, const std::array<int64_t, 17>& geometry, uintptr_t x,
                                      uintptr_t core, uintptr_t out_factor, uintptr_t in_factor,
                                      uintptr_t bias, uintptr_t y, uintptr_t z, uintptr_t t, int threads) {
    py::gil_scoped_release release;
    const tk_conv2d conv = conv2d(geometry);
    check(tk_tucker_conv_forward_cpu(static_cast<tk_dtype>(dtype), &conv, pointer<const void>(x),
                                     pointer<const void>(core), pointer<const void>(out_factor),
                                     pointer<const void>(in_factor), pointer<const void>(bias),
                                     pointer<void>(y), pointer<void>(z), pointer<void>(t), threads),
          "tucker_conv_forward");
  });
  // gradients: of input, core, out_factor, in_factor, bias; 0 where not wanted. known: the leading block of
  // the core's gradient that is left zero.
  m.def("tucker_conv_backward_cpu",
        [](int dtype, const std::array<int64_t, 17>& geometry, uintptr_t grad, uintptr_t x, uintptr_t z,
           uintptr_t t, uintptr_t core, uintptr_t out_factor, uintptr_t in_factor,
           const std::array<uintptr_t, 5>& gradients, const std::array<int64_t, 2>& known, int threads) {
          py::gil_scoped_release release;
          const tk_conv2d conv = conv2d(geometry);
          const tk_conv2d_gradients wanted = {pointer<void>(gradients[0]), pointer<void>(gradients[1]),
                                              pointer<void>(gradients[2]), pointer<void>(gradients[3]),
                                              pointer<void>(gradients[4]), {known[0], known[1]}};
          check(tk_tucker_conv_backward_cpu(
                    static_cast<tk_dtype>(dtype), &conv, pointer<const void>(grad), pointer<const void>(x),
                    pointer<const void>(z), pointer<const void>(t), pointer<const void>(core),
                    pointer<const void>(out_factor), pointer<const void>(in_factor), &wanted, threads),
                "tucker_conv_backward");
        });
}
