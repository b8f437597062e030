// Launch plan of batched_qr: Q from the block Gram–Schmidt of the leading columns, R = QᵀA.
#include "cuda/operators.h"
#include "cuda/orthonormalise.h"

namespace tk {

tk_status batched_qr_plan(tk_dtype dtype, const tk_batched_qr_problem* problems, int64_t count,
                          void* workspace, const Device& device, Plan* plan) {
  const auto check = [](const tk_batched_qr_problem& p) { return check_matrix(p.m, p.n); };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    std::vector<Orthonormalization<T>> all;
    GemmTable<T> products;
    for (int64_t i = 0; i < count; ++i) {
      const tk_batched_qr_problem& p = problems[i];
      const int64_t k = std::min(p.m, p.n);
      const Matrix<T> a{static_cast<const T*>(p.matrix), p.n, 1};
      Orthonormalization<T> o{};
      o.d = a;
      o.v = static_cast<T*>(p.q);
      o.n = p.m, o.p = k;
      o.tolerance = dependence_tolerance<T>(p.m);
      o.flag = flags + i;
      o.on_flag = OnFlag::nan;
      all.push_back(o);
      const Matrix<T> q{static_cast<const T*>(p.q), k, 1};
      GemmProblem<T>& r = products.add(k, p.n, p.m, q.transposed(), a, static_cast<T*>(p.r), p.n);
      r.upper = 1;
      r.flag = flags + i;
      r.on_flag = OnFlag::nan;
    }
    orthonormalise(builder, all);
    products.launch(builder);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
