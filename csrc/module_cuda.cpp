// The CUDA half of the bindings. NAME_cuda_plan(dtype, problems, count, …, workspace, multiprocessors,
// shared_bytes) is in every build and shows what an operator would launch. NAME_cuda takes the arguments of
// tk_NAME_cuda and is there where kernels were compiled. NAME_cuda_at(function, …) is the same with the C
// function at an address, for kernels in another library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/operators.h"
#include "module.h"

namespace py = pybind11;

namespace {

// What tests want to know of a problem in a table: sizes, tiles and the addresses that are written.
py::dict shown(std::initializer_list<std::pair<const char*, int64_t>> fields) {
  py::dict out;
  for (const auto& [name, value] : fields) out[name] = value;
  return out;
}
int64_t at(const void* address) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)); }

template <class T>
py::dict shown(const tk::GemmProblem<T>& p) {
  return shown({{"m", p.m},
                {"n", p.n},
                {"depth", p.depth},
                {"first_tile", p.first_tile},
                {"out", at(p.out)},
                {"squares", at(p.squares)},
                {"a", at(p.a)},
                {"b", at(p.b)},
                {"flag", at(p.flag)},
                {"on_flag", static_cast<int64_t>(p.on_flag)}});
}
template <class T>
py::dict shown(const tk::ProjectionProblem<T>& p) {
  return shown({{"n", p.n},
                {"r", p.r},
                {"cols", p.cols},
                {"passes", p.passes},
                {"first_tile", p.first_tile},
                {"work", at(p.work)},
                {"out", at(p.out)},
                {"flag", at(p.flag)}});
}
template <class T>
py::dict shown(const tk::TriangularProblem<T>& p) {
  return shown({{"m", p.m},
                {"n", p.n},
                {"first_tile", p.first_tile},
                {"out", at(p.out)},
                {"flag", at(p.flag)},
                {"on_flag", static_cast<int64_t>(p.on_flag)}});
}
template <class T>
py::dict shown(const tk::GramProblem<T>& p) {
  return shown({{"size", p.size},
                {"depth", p.depth},
                {"splits", p.splits},
                {"split_depth", p.split_depth},
                {"first_tile", p.first_tile},
                {"out", at(p.gram)},
                {"partial", at(p.partial)},
                {"finished", at(p.finished)}});
}
template <class T>
py::dict shown(const tk::CholeskyProblem<T>& p) {
  return shown({{"size", p.size},
                {"resident", p.resident},
                {"work", at(p.work)},
                {"inverse", at(p.inverse)},
                {"factor", at(p.factor)},
                {"trace", at(p.trace)},
                {"flag", at(p.flag)}});
}
template <class T>
py::dict shown(const tk::JacobiProblem<T>& p) {
  return shown({{"size", p.size},
                {"width", p.width},
                {"meetings", p.meetings},
                {"first_block", p.first_block},
                {"progress", at(p.progress)},
                {"factor", at(p.factor)},
                {"out", at(p.basis)},
                {"flag", at(p.flag)},
                {"min_rank", p.min_rank},
                {"max_rank", p.max_rank}});
}
template <class T>
py::dict shown(const tk::FinishProblem<T>& p) {
  return shown({{"tiles", p.tiles}, {"modes", p.modes}, {"work", at(p.work)}, {"out", at(p.error)}});
}

template <class Problem>
py::list table(const tk::Plan& plan, const tk::Launch& launch) {
  py::list out;
  for (int32_t i = 0; i < launch.count; ++i) {
    Problem problem;
    std::memcpy(&problem, plan.table.data() + launch.table + i * sizeof(Problem), sizeof(Problem));
    out.append(shown(problem));
  }
  return out;
}

template <class T>
py::list problems(const tk::Plan& plan, const tk::Launch& launch) {
  switch (launch.kernel) {
#define TK_KERNEL(name, Problem, how, bytes) \
  case tk::Kernel::name:                     \
    return table<tk::Problem<T>>(plan, launch);
    TK_KERNELS(TK_KERNEL)
#undef TK_KERNEL
  }
  return py::list();
}

py::dict describe(const tk::Plan& plan) {
  py::list launches;
  for (const tk::Launch& l : plan.launches) {
    py::dict one;
    one["kernel"] = tk::kernel_name(l.kernel);
    one["problems"] = plan.dtype == TK_FLOAT64 ? problems<double>(plan, l) : problems<float>(plan, l);
    one["work"] = l.work;
    one["grid"] = l.grid;
    one["block"] = l.block;
    one["shared"] = l.shared;
    one["static_shared"] = tk::static_shared_bytes(l.kernel);
    launches.append(one);
  }
  py::dict out;
  out["launches"] = launches;
  out["workspace"] = plan.workspace;
  out["table"] = py::bytes(reinterpret_cast<const char*>(plan.table.data()), plan.table.size());
  py::list stores;
  for (const tk::TablePiece& piece : tk::pieces(plan.table))
    stores.append(py::bytes(reinterpret_cast<const char*>(&piece), sizeof piece));
  out["stores"] = stores;
  return out;
}

#if defined(TK_CUDA_ARCHITECTURES)
const char* cuda_words(tk_status status) {
  return status == TK_CUDA_ERROR ? tk_cuda_error() : tk_status_string(status);
}
#else
Words* const cuda_words = nullptr;
#endif

// Binds one operator, every way. `call` is null where no kernels were compiled.
template <class Problem, class... Rest, class... A>
void bind_every_way(py::module_& m, const std::string& name, tk::PlanFunction<Problem, Rest...>* make_plan,
                    tk_status (*call)(A...)) {
  m.def((name + "_cuda_plan").c_str(), [=](int dtype, uintptr_t problems, int64_t count, Given<Rest>... rest,
                                           uintptr_t workspace, int multiprocessors, int64_t shared_bytes) {
    tk::Plan plan;
    check(make_plan(static_cast<tk_dtype>(dtype), pointer<const Problem>(problems), count, pointer(workspace),
                    {multiprocessors, shared_bytes}, &plan, taken<Rest>(rest)...),
          name.c_str());
    return describe(plan);
  });
  m.def((name + "_cuda_at").c_str(), [=](uintptr_t function, Given<A>... given) {
    check(reinterpret_cast<decltype(call)>(function)(taken<A>(given)...), name.c_str());
  });
  if (call) ::bind(m, name + "_cuda", call, cuda_words);  // unqualified, std::bind would be chosen
}

}  // namespace

#if defined(TK_CUDA_ARCHITECTURES)
#define TK_CALL(function) function
#else
#define TK_CALL(function) static_cast<decltype(&function)>(nullptr)
#endif
#define TK_BIND(name) bind_every_way(m, #name, tk::name##_plan, TK_CALL(tk_##name##_cuda))

void bind_cuda(py::module_& m) {
#if defined(TK_CUDA_ARCHITECTURES)
  m.def("cuda_architectures", &tk_cuda_architectures);
  m.def("cuda_unusable", &tk_cuda_unusable);
#endif
  TK_BIND(multi_mode_dot);
  TK_BIND(cross_gram);
  TK_BIND(tangent_basis);
  TK_BIND(hosvd_truncate);
  TK_BIND(rotate_bases);
  TK_BIND(gram_solve);
  TK_BIND(batched_qr);
  TK_BIND(batched_svd);
}
