// The CUDA half of the bindings. NAME_cuda_plan(arguments…, device) is in every build and shows what an
// operator would launch. NAME_cuda(arguments…, workspace, bytes, stream) is there where kernels were
// compiled; a workspace of 0 asks for its size. NAME_cuda_at(function, …) is the same with the C function at
// an address, for kernels in another library. Addresses are integers; each problem is one tuple.
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
                {"a", at(p.a)},
                {"b", at(p.b)},
                {"flag", at(p.flag)}});
}
template <class T>
py::dict shown(const tk::ProjectionProblem<T>& p) {
  return shown({{"n", p.n},
                {"r", p.r},
                {"cols", p.cols},
                {"passes", p.passes},
                {"first_tile", p.first_tile},
                {"work", at(p.work)},
                {"out", at(p.out)}});
}
template <class T>
py::dict shown(const tk::TriangularProblem<T>& p) {
  return shown({{"m", p.m}, {"n", p.n}, {"first_tile", p.first_tile}, {"out", at(p.out)}});
}
template <class T>
py::dict shown(const tk::GramProblem<T>& p) {
  return shown({{"size", p.size},
                {"depth", p.depth},
                {"splits", p.splits},
                {"split_depth", p.split_depth},
                {"first_tile", p.first_tile},
                {"out", at(p.gram)},
                {"partial", at(p.partial)}});
}
template <class T>
py::dict shown(const tk::CholeskyProblem<T>& p) {
  return shown({{"size", p.size},
                {"resident", p.resident},
                {"work", at(p.work)},
                {"out", p.inverse ? at(p.inverse) : at(p.factor)}});
}
template <class T>
py::dict shown(const tk::JacobiProblem<T>& p) {
  return shown({{"size", p.size},
                {"resident", p.resident},
                {"out", at(p.basis)},
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

template <class Problem>
using Call = tk_status(tk_dtype, int32_t, const Problem*, void*, int64_t*, void*);

// Binds one operator, every way. `convert` makes the C struct of what Python gives per problem.
template <class Given, class Problem>
void bind(py::module_& m, const char* name, Problem (*convert)(const Given&),
          tk::PlanFunction<Problem> make_plan, Call<Problem>* call) {
  const std::string what = name;
  const auto converted = [convert](const std::vector<Given>& given) {
    std::vector<Problem> problems;
    for (const Given& one : given) problems.push_back(convert(one));
    return problems;
  };
  m.def((what + "_cuda_plan").c_str(), [=](int dtype, const std::vector<Given>& given, uintptr_t workspace,
                                           int multiprocessors, int64_t shared_bytes) {
    const auto problems = converted(given);
    tk::Plan plan;
    check(make_plan(static_cast<tk_dtype>(dtype), static_cast<int32_t>(problems.size()), problems.data(),
                    reinterpret_cast<void*>(workspace), {multiprocessors, shared_bytes}, &plan),
          what.c_str());
    return describe(plan);
  });
  const auto run = [=](Call<Problem>* function, int dtype, const std::vector<Given>& given,
                       uintptr_t workspace, int64_t bytes, uintptr_t stream) {
    const auto problems = converted(given);
    check(function(static_cast<tk_dtype>(dtype), static_cast<int32_t>(problems.size()), problems.data(),
                   reinterpret_cast<void*>(workspace), &bytes, reinterpret_cast<void*>(stream)),
          what.c_str());
    return bytes;
  };
  m.def((what + "_cuda_at").c_str(), [=](uintptr_t function, int dtype, const std::vector<Given>& given,
                                         uintptr_t workspace, int64_t bytes, uintptr_t stream) {
    return run(reinterpret_cast<Call<Problem>*>(function), dtype, given, workspace, bytes, stream);
  });
  if (call != nullptr)
    m.def((what + "_cuda").c_str(),
          [=](int dtype, const std::vector<Given>& given, uintptr_t workspace, int64_t bytes,
              uintptr_t stream) { return run(call, dtype, given, workspace, bytes, stream); });
}

// (a, b, out, outer, inner, a_size, b_size)
using GivenCrossGram = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;
tk_cross_gram cross_gram(const GivenCrossGram& given) {
  const auto& [a, b, out, outer, inner, a_size, b_size] = given;
  return {pointer(a), pointer(b), pointer(out), outer, inner, a_size, b_size};
}

// (basis, direction, tangent, kept, n, r, p)
using GivenTangent = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
tk_tangent tangent(const GivenTangent& given) {
  const auto& [basis, direction, out, kept, n, r, columns] = given;
  return {pointer(basis), pointer(direction), pointer(out), pointer<int64_t>(kept), n, r, columns};
}

// (core, new_core, projections, ranks, error, shape, min_ranks, max_ranks, width, tol, per_mode, sweeps)
using GivenTruncation = std::tuple<uintptr_t, uintptr_t, Addresses, uintptr_t, uintptr_t, Sizes, Sizes, Sizes,
                                   int32_t, double, bool, int32_t>;
tk_truncation truncation(const GivenTruncation& given) {
  const auto& [core, new_core, projections, ranks, error, shape, least, most, width, tol, per_mode, sweeps] =
      given;
  tk_truncation p{};
  p.core = pointer(core);
  p.new_core = pointer(new_core);
  p.ranks = pointer<int64_t>(ranks);
  p.error = pointer<double>(error);
  p.tol = tol;
  p.ndim = static_cast<int32_t>(shape.size());
  p.width = width;
  p.per_mode = per_mode;
  p.sweeps = sweeps;
  copy_sizes("hosvd_truncate", shape, p.shape, shape.size());
  copy_sizes("hosvd_truncate", least, p.min_ranks, shape.size());
  copy_sizes("hosvd_truncate", most, p.max_ranks, shape.size());
  if (projections.size() != shape.size())
    throw std::runtime_error("hosvd_truncate: one projection for each mode");
  for (size_t d = 0; d < shape.size(); ++d) p.projections[d] = pointer(projections[d]);
  return p;
}

// (basis, rotation, rotated, n, size, rank, rotation_row)
using GivenRotation = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;
tk_rotation_problem rotation(const GivenRotation& given) {
  const auto& [basis, matrix, rotated, n, size, rank, row] = given;
  return {pointer(basis), pointer(matrix), pointer(rotated), n, size, rank, row};
}

// (tensor, right_side, solution, outer, n, inner, rows)
using GivenGramSolve = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;
tk_gram_solve_problem gram_solve(const GivenGramSolve& given) {
  const auto& [tensor, right_side, solution, outer, n, inner, rows] = given;
  return {pointer(tensor), pointer(right_side), pointer(solution), outer, n, inner, rows};
}

// (matrix, q, r, m, n)
using GivenQR = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;
tk_qr_problem qr(const GivenQR& given) {
  const auto& [matrix, q, r, m, n] = given;
  return {pointer(matrix), pointer(q), pointer(r), m, n};
}

// (matrix, u, s, vh, m, n)
using GivenSVD = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;
tk_svd_problem svd(const GivenSVD& given) {
  const auto& [matrix, u, s, vh, m, n] = given;
  return {pointer(matrix), pointer(u), pointer(s), pointer(vh), m, n};
}

#if defined(TK_CUDA_ARCHITECTURES)
#define TK_CALL(function) function
#else
#define TK_CALL(function) static_cast<decltype(&function)>(nullptr)  // untyped, std::bind would be chosen
#endif

}  // namespace

void bind_cuda(py::module_& m) {
#if defined(TK_CUDA_ARCHITECTURES)
  m.def("cuda_architectures", &tk_cuda_architectures);
#endif
  bind(m, "multi_mode_dot", mode_products, tk::multi_mode_dot_plan, TK_CALL(tk_multi_mode_dot_cuda));
  bind(m, "cross_gram", cross_gram, tk::cross_gram_plan, TK_CALL(tk_cross_gram_cuda));
  bind(m, "tangent_basis", tangent, tk::tangent_basis_plan, TK_CALL(tk_tangent_basis_cuda));
  bind(m, "hosvd_truncate", truncation, tk::hosvd_truncate_plan, TK_CALL(tk_hosvd_truncate_cuda));
  bind(m, "batched_qr", qr, tk::batched_qr_plan, TK_CALL(tk_batched_qr_cuda));
  bind(m, "batched_svd", svd, tk::batched_svd_plan, TK_CALL(tk_batched_svd_cuda));
  bind(m, "rotate_bases", rotation, tk::rotate_bases_plan, TK_CALL(tk_rotate_bases_cuda));
  bind(m, "gram_solve", gram_solve, tk::gram_solve_plan, TK_CALL(tk_gram_solve_cuda));
}
