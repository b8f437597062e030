// Launch plan of rotate_bases: products and one Newton step, whose Gram matrices are float64; three launches
// for all problems.
#include "cuda/gram_table.h"
#include "cuda/operators.h"

namespace tk {

tk_status rotate_bases_plan(tk_dtype dtype, const tk_rotate_bases_problem* problems, int64_t count,
                            void* workspace, const Device& device, Plan* plan) {
  const auto check = [](const tk_rotate_bases_problem& p) {
    if (p.n < 0 || p.size < 0 || p.rank < 0 || p.rotation_row < p.rank) return TK_INVALID_ARGUMENT;
    if (std::max({p.n, p.size, p.rank}) >= largest_index) return TK_UNSUPPORTED;
    return TK_OK;
  };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    GemmTable<T> products;
    NewtonTable<T> steps;
    for (int64_t i = 0; i < count; ++i) {
      const tk_rotate_bases_problem& p = problems[i];
      if (p.n == 0 || p.rank == 0) continue;
      T* product = builder.scratch<T>(p.n * p.rank);
      products.add(p.n, p.rank, p.size, {static_cast<const T*>(p.basis), p.size, 1},
                   {static_cast<const T*>(p.rotation), p.rotation_row, 1}, product, p.rank);
      steps.add(builder, product, p.n, p.rank, static_cast<T*>(p.rotated), nullptr, OnFlag::skip);
    }
    products.launch(builder);
    steps.launch(builder);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
