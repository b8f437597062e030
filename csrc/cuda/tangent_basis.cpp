// Launch plan of tangent_basis: one block Gram–Schmidt over all problems.
#include "cuda/operators.h"
#include "cuda/orthonormalise.h"

namespace tk {

tk_status tangent_basis_plan(tk_dtype dtype, int32_t count, const tk_tangent* problems, void* workspace,
                             const Device& device, Plan* plan) {
  const auto check = [](const tk_tangent& p) {
    if (p.n < 0 || p.r < 0 || p.p < 0) return TK_INVALID_ARGUMENT;
    if (p.p > largest_factorization || p.n >= largest_index || p.r >= largest_index) return TK_UNSUPPORTED;
    return TK_OK;
  };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    std::vector<Orthonormalization<T>> all;
    for (int32_t i = 0; i < count; ++i) {
      const tk_tangent& p = problems[i];
      Orthonormalization<T> o{};
      o.u = static_cast<const T*>(p.basis);
      o.d = {static_cast<const T*>(p.direction), p.p, 1};
      o.v = static_cast<T*>(p.tangent);
      o.n = p.n, o.r = p.r, o.p = p.p;
      o.pack = true;
      o.tolerance = dependence_tolerance<T>(p.n);
      o.rank = p.kept;
      o.flag = flags + i;
      o.on_flag = OnFlag::zero;
      all.push_back(o);
    }
    orthonormalise(builder, all);
  };
  return plan_problems(dtype, count, problems, workspace, device, plan, check, build);
}

}  // namespace tk
