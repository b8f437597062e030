// Launch plan of batched_svd: eigenvectors of the Gram matrix of the shorter side, then the longer side by
// one product and a block Gram–Schmidt, which also repairs vectors of small singular values. Where a matrix
// is not finite the eigenvectors are NaN, and so is what is made of them.
#include "cuda/eigenbasis.h"
#include "cuda/operators.h"
#include "cuda/orthonormalise.h"

namespace tk {

tk_status batched_svd_plan(tk_dtype dtype, const tk_batched_svd_problem* problems, int64_t count,
                           void* workspace, const Device& device, Plan* plan) {
  const auto check = [](const tk_batched_svd_problem& p) { return check_matrix(p.m, p.n); };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    std::vector<Eigenproblem<T>> eigen;
    std::vector<Orthonormalization<T>> longer;
    GemmTable<T> products, turned;
    for (int64_t i = 0; i < count; ++i) {
      const tk_batched_svd_problem& p = problems[i];
      const bool wide = p.m <= p.n;
      const int64_t k = std::min(p.m, p.n), length = std::max(p.m, p.n);
      const Matrix<T> matrix{static_cast<const T*>(p.matrix), p.n, 1};
      const Matrix<T> a = wide ? matrix : matrix.transposed();  // k×length
      T* basis = wide ? static_cast<T*>(p.u) : builder.scratch<T>(k * k);
      T* product = builder.scratch<T>(length * k);
      Eigenproblem<T> e{};
      e.a = a;
      e.size = k, e.depth = length;
      e.basis = basis;
      e.sigma = static_cast<T*>(p.s);
      e.bound = -1;
      e.max_rank = static_cast<int32_t>(k);
      e.flag = flags + i;
      e.on_flag = OnFlag::nan;
      eigen.push_back(e);
      products.add(length, k, k, a.transposed(), {basis, k, 1}, product, k);
      Orthonormalization<T> o{};
      o.d = {product, k, 1};
      o.v = static_cast<T*>(wide ? p.vh : p.u);
      o.transposed = wide;
      o.n = length, o.p = k;
      o.tolerance = dependence_tolerance<T>(length);
      o.flag = flags + i;
      o.on_flag = OnFlag::nan;
      longer.push_back(o);
      if (!wide) {  // vh = basisᵀ
        GemmProblem<T>& t = turned.add(k, k, 0, {}, {}, static_cast<T*>(p.vh), k);
        t.source = basis, t.source_row = 1, t.source_col = k, t.beta = 1;
      }
    }
    eigenbases(builder, eigen);
    products.launch(builder);
    turned.launch(builder);
    orthonormalise(builder, longer);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
