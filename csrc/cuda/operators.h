// The launch plans of the operators in tucker_kernels_cuda.h, as pure host functions that tests can call. The
// workspace may be null when only its size is wanted.
#pragma once

#include <algorithm>

#include "cuda/plan.h"
#include "kernels/limits.h"
#include "tucker_kernels_cuda.h"

namespace tk {

// Rows, columns and flattened indices must stay below this (kernels count them in 32 bits, with room for a
// tile).
constexpr int64_t largest_index = (int64_t(1) << 31) - 4096;

// Whether an m×n matrix can be factorised.
inline tk_status check_matrix(int64_t m, int64_t n) {
  if (m < 0 || n < 0) return TK_INVALID_ARGUMENT;
  if (std::min(m, n) > largest_factorization || std::max(m, n) >= largest_index) return TK_UNSUPPORTED;
  return TK_OK;
}

// `Rest` is what the operator takes beside its problems.
template <class Problem, class... Rest>
using PlanFunction = tk_status(tk_dtype dtype, const Problem* problems, int64_t count, void* workspace,
                               const Device& device, Plan* plan, Rest... rest);

PlanFunction<tk_multi_mode_dot_problem> multi_mode_dot_plan;
PlanFunction<tk_cross_gram_problem> cross_gram_plan;
PlanFunction<tk_tangent_basis_problem, int64_t*> tangent_basis_plan;  // counts
// tol, per_mode, ranks, width, errors
PlanFunction<tk_hosvd_truncate_problem, const double*, int, int64_t*, int64_t, double*> hosvd_truncate_plan;
PlanFunction<tk_batched_qr_problem> batched_qr_plan;
PlanFunction<tk_batched_svd_problem> batched_svd_plan;
PlanFunction<tk_rotate_bases_problem> rotate_bases_plan;
PlanFunction<tk_gram_solve_problem> gram_solve_plan;

}  // namespace tk
