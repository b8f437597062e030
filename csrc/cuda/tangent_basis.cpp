// Launch plan of tangent_basis: one block Gram–Schmidt over all problems.
#include "cuda/operators.h"
#include "cuda/orthonormalise.h"

namespace tk {

tk_status tangent_basis_plan(tk_dtype dtype, const tk_tangent_basis_problem* problems, int64_t count,
                             void* workspace, const Device& device, Plan* plan, int64_t* counts) {
  const auto check = [](const tk_tangent_basis_problem& p) {
    if (p.n < 0 || p.rank < 0 || p.count < 0) return TK_INVALID_ARGUMENT;
    if (p.count > largest_factorization || p.n >= largest_index || p.rank >= largest_index)
      return TK_UNSUPPORTED;
    return TK_OK;
  };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    std::vector<Orthonormalization<T>> all;
    for (int64_t i = 0; i < count; ++i) {
      const tk_tangent_basis_problem& p = problems[i];
      Orthonormalization<T> o{};
      o.u = static_cast<const T*>(p.basis);
      o.d = {static_cast<const T*>(p.directions), p.count, 1};
      o.v = static_cast<T*>(p.found);
      o.n = p.n, o.r = p.rank, o.p = p.count;
      o.pack = true;
      o.tolerance = dependence_tolerance<T>(p.n);
      o.rank = counts + i;
      o.flag = flags + i;
      o.on_flag = OnFlag::zero;
      all.push_back(o);
    }
    orthonormalise(builder, all);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
