// Launch plan of multi_mode_dot: one grouped_gemm per step of the chain, intermediates in the workspace.
#include "cuda/mode_products.h"
#include "cuda/operators.h"

namespace tk {
namespace {

tk_status check(const tk_mode_products& p) {
  if (p.ndim < 1 || p.ndim > TK_MAX_MODES || p.products < 1 || p.products > TK_MAX_MODES)
    return TK_INVALID_ARGUMENT;
  int64_t sizes[TK_MAX_MODES];
  for (int32_t d = 0; d < p.ndim; ++d) sizes[d] = p.shape[d];
  for (int32_t k = 0; k < p.products; ++k) {
    const int32_t mode = p.modes[k];
    if (mode < 0 || mode >= p.ndim || p.rows[k] < 0) return TK_INVALID_ARGUMENT;
    int64_t others = 1;
    for (int32_t d = 0; d < p.ndim; ++d) {
      if (sizes[d] < 0) return TK_INVALID_ARGUMENT;
      if (sizes[d] >= largest_index) return TK_UNSUPPORTED;
      others *= d == mode ? 1 : sizes[d];
      if (others >= largest_index) return TK_UNSUPPORTED;
    }
    sizes[mode] = p.rows[k];
    if (p.rows[k] >= largest_index) return TK_UNSUPPORTED;
  }
  return TK_OK;
}

}  // namespace

tk_status multi_mode_dot_plan(tk_dtype dtype, int32_t count, const tk_mode_products* problems,
                              void* workspace, const Device& device, Plan* plan) {
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    std::vector<ModeProducts<T>> chains;
    for (int32_t c = 0; c < count; ++c) {
      const tk_mode_products& p = problems[c];
      ModeProducts<T> chain{static_cast<const T*>(p.tensor), static_cast<T*>(p.out), {}, {}};
      chain.shape.assign(p.shape, p.shape + p.ndim);
      std::vector<int64_t> sizes = chain.shape;
      for (int32_t k = 0; k < p.products; ++k) {
        Matrix<T> matrix{static_cast<const T*>(p.matrices[k]), sizes[p.modes[k]], 1};
        if (p.transpose) matrix = {matrix.data, 1, p.rows[k]};
        chain.products.push_back({p.modes[k], matrix, p.rows[k]});
        sizes[p.modes[k]] = p.rows[k];
      }
      chains.push_back(chain);
    }
    mode_products(builder, chains, [](size_t, GemmProblem<T>&) {});
  };
  return plan_problems(dtype, count, problems, workspace, device, plan, check, build);
}

}  // namespace tk
