// Launch plan of gram_solve: X = B R⁻¹ R⁻ᵀ with RᵀR = M Mᵀ + ρ I, four launches for all problems.
//
// ρ = 4ε tr(M Mᵀ) keeps every pivot above rounding and ‖R‖ ‖R⁻¹‖ below 1 / (2 √ε). In float32 R⁻¹ in double
// is therefore as good as substitution, and rounding B R⁻¹ moves X (M Mᵀ + ρ I) by less than ρ X.
#include <limits>

#include "cuda/gram_table.h"
#include "cuda/operators.h"

namespace tk {

tk_status gram_solve_plan(tk_dtype dtype, const tk_gram_solve_problem* problems, int64_t count,
                          void* workspace, const Device& device, Plan* plan) {
  const auto check = [](const tk_gram_solve_problem& p) {
    if (p.outer < 0 || p.n < 0 || p.inner < 0 || p.rows < 0) return TK_INVALID_ARGUMENT;
    if (p.n > largest_factorization || p.rows >= largest_index || p.outer * p.inner >= largest_index)
      return TK_UNSUPPORTED;
    return TK_OK;
  };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    GramTable<T> grams;
    CholeskyTable<T> factors;
    TriangularTable<T> forth, back;
    for (int64_t i = 0; i < count; ++i) {
      const tk_gram_solve_problem& p = problems[i];
      if (p.n == 0 || p.rows == 0) continue;
      double* gram = builder.scratch<double>(p.n * p.n);
      double* inverse = builder.scratch<double>(p.n * p.n);
      T* half = builder.scratch<T>(p.rows * p.n);
      grams.add_unfolding(builder, static_cast<const T*>(p.tensor), p.outer, p.n, p.inner, gram);
      CholeskyProblem<T>& c = factors.add(builder, gram, p.n, 0, flags + i);
      c.inverse = inverse;
      c.shift = 4.0 * std::numeric_limits<T>::epsilon();
      forth.add(p.rows, p.n, {static_cast<const T*>(p.right_side), p.n, 1}, inverse, half, flags + i);
      TriangularProblem<T>& last =
          back.add(p.rows, p.n, {half, p.n, 1}, inverse, static_cast<T*>(p.solution), flags + i);
      last.transposed = 1;
      last.on_flag = OnFlag::nan;
    }
    grams.launch(builder);
    factors.launch(builder);
    forth.launch(builder);
    back.launch(builder);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
