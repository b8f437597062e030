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

template <class Problem>
using PlanFunction = tk_status(tk_dtype dtype, int32_t count, const Problem* problems, void* workspace,
                               const Device& device, Plan* plan);

PlanFunction<tk_mode_products> multi_mode_dot_plan;
PlanFunction<tk_cross_gram> cross_gram_plan;
PlanFunction<tk_tangent> tangent_basis_plan;
PlanFunction<tk_truncation> hosvd_truncate_plan;
PlanFunction<tk_qr_problem> batched_qr_plan;
PlanFunction<tk_svd_problem> batched_svd_plan;
PlanFunction<tk_rotation_problem> rotate_bases_plan;
PlanFunction<tk_gram_solve_problem> gram_solve_plan;

}  // namespace tk
