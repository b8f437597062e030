// The CUDA half of the bindings. NAME_cuda_plan(arguments…, multiprocessors) is in every build and shows what
// an operator would launch. NAME_cuda(arguments…, workspace, bytes, stream) is there where kernels were
// compiled; a workspace of 0 asks for its size. Addresses are integers; each problem is one tuple.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/operators.h"

namespace py = pybind11;

namespace {

void check(tk_status status, const char* what) {
  if (status != TK_OK) throw std::runtime_error(std::string(what) + ": " + tk_status_string(status));
}

py::dict describe(const tk::Plan& plan) {
  py::list launches;
  for (const tk::Launch& l : plan.launches) {
    py::dict one;
    one["kernel"] = tk::kernel_name(l.kernel);
    one["problems"] = l.count;
    one["work"] = l.work;
    one["grid"] = l.grid;
    one["block"] = l.block;
    one["shared"] = l.shared;
    one["table"] = l.table;
    launches.append(one);
  }
  py::dict out;
  out["launches"] = launches;
  out["workspace"] = plan.workspace;
  out["table"] = py::bytes(reinterpret_cast<const char*>(plan.table.data()), plan.table.size());
  return out;
}

// Binds one operator, both ways. `Problem` is what Python gives per problem, `convert` makes the C struct of
// it.
template <class Problem, class Convert, class MakePlan, class Call>
void bind(py::module_& m, const char* name, Convert convert, MakePlan make_plan, Call call) {
  const std::string what = name;
  const auto converted = [convert](const std::vector<Problem>& given) {
    std::vector<decltype(convert(given[0]))> problems;
    for (const Problem& one : given) problems.push_back(convert(one));
    return problems;
  };
  m.def((what + "_cuda_plan").c_str(),
        [=](int dtype, const std::vector<Problem>& given, uintptr_t workspace, int multiprocessors) {
          const auto problems = converted(given);
          tk::Plan plan;
          check(make_plan(static_cast<tk_dtype>(dtype), static_cast<int32_t>(problems.size()),
                          problems.data(), reinterpret_cast<void*>(workspace), multiprocessors, &plan),
                what.c_str());
          return describe(plan);
        });
  if constexpr (!std::is_same_v<Call, std::nullptr_t>)
    m.def((what + "_cuda").c_str(), [=](int dtype, const std::vector<Problem>& given, uintptr_t workspace,
                                        int64_t bytes, uintptr_t stream) {
      const auto problems = converted(given);
      check(call(static_cast<tk_dtype>(dtype), static_cast<int32_t>(problems.size()), problems.data(),
                 reinterpret_cast<void*>(workspace), &bytes, reinterpret_cast<void*>(stream)),
            what.c_str());
      return bytes;
    });
}

// (tensor, out, shape, modes, rows, matrices, transpose)
using ModeProducts = std::tuple<uintptr_t, uintptr_t, std::vector<int64_t>, std::vector<int32_t>,
                                std::vector<int64_t>, std::vector<uintptr_t>, bool>;

tk_mode_products mode_products(const ModeProducts& given) {
  const auto& [tensor, out, shape, modes, rows, matrices, transpose] = given;
  if (shape.size() > TK_MAX_MODES || modes.size() > TK_MAX_MODES || rows.size() != modes.size() ||
      matrices.size() != modes.size())
    throw std::runtime_error("multi_mode_dot: at most 8 modes, with one row count and one matrix each");
  tk_mode_products p{};
  p.tensor = reinterpret_cast<const void*>(tensor);
  p.out = reinterpret_cast<void*>(out);
  p.ndim = static_cast<int32_t>(shape.size());
  p.products = static_cast<int32_t>(modes.size());
  p.transpose = transpose;
  for (size_t d = 0; d < shape.size(); ++d) p.shape[d] = shape[d];
  for (size_t k = 0; k < modes.size(); ++k) {
    p.modes[k] = modes[k];
    p.rows[k] = rows[k];
    p.matrices[k] = reinterpret_cast<const void*>(matrices[k]);
  }
  return p;
}

#if defined(TK_CUDA_ARCHITECTURES)
#define TK_CALL(function) function
#else
#define TK_CALL(function) nullptr
#endif

}  // namespace

void bind_cuda(py::module_& m) {
#if defined(TK_CUDA_ARCHITECTURES)
  m.def("cuda_architectures", &tk_cuda_architectures);
#endif
  bind<ModeProducts>(m, "multi_mode_dot", mode_products, tk::multi_mode_dot_plan,
                     TK_CALL(tk_multi_mode_dot_cuda));
}
