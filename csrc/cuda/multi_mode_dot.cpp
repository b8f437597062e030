// Launch plan of multi_mode_dot: one grouped_gemm per step of the chain, intermediates in the workspace.
#include "core/mode_order.h"
#include "cuda/mode_products.h"
#include "cuda/operators.h"

namespace tk {
namespace {

// Of a problem's products, the cheapest.
struct Order {
  explicit Order(const tk_multi_mode_dot_problem& p) {
    int64_t n[TK_MAX_MODES];
    for (int64_t k = 0; k < p.products; ++k) n[k] = p.shape[p.modes[k]];
    cheapest_order(static_cast<int>(p.products), n, p.rows, order);
  }
  int operator[](int64_t step) const { return order[step]; }
  int order[TK_MAX_MODES];
};

tk_status check(const tk_multi_mode_dot_problem& p) {
  if (p.ndim < 1 || p.ndim > TK_MAX_MODES || p.products < 1 || p.products > p.ndim)
    return TK_INVALID_ARGUMENT;
  bool seen[TK_MAX_MODES] = {};
  for (int64_t k = 0; k < p.products; ++k) {
    const int64_t mode = p.modes[k];
    if (mode < 0 || mode >= p.ndim || seen[mode] || p.rows[k] < 0) return TK_INVALID_ARGUMENT;
    seen[mode] = true;
  }
  int64_t sizes[TK_MAX_MODES];
  for (int64_t d = 0; d < p.ndim; ++d) sizes[d] = p.shape[d];
  const Order order(p);
  for (int64_t step = 0; step < p.products; ++step) {
    const int k = order[step];
    const int64_t mode = p.modes[k];
    int64_t others = 1;
    for (int64_t d = 0; d < p.ndim; ++d) {
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

tk_status multi_mode_dot_plan(tk_dtype dtype, const tk_multi_mode_dot_problem* problems, int64_t count,
                              void* workspace, const Device& device, Plan* plan) {
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    std::vector<ModeProducts<T>> chains;
    for (int64_t c = 0; c < count; ++c) {
      const tk_multi_mode_dot_problem& p = problems[c];
      ModeProducts<T> chain{static_cast<const T*>(p.tensor), static_cast<T*>(p.out), {}, {}};
      chain.shape.assign(p.shape, p.shape + p.ndim);
      const Order order(p);
      for (int64_t step = 0; step < p.products; ++step) {
        const int k = order[step];
        Matrix<T> matrix{static_cast<const T*>(p.matrices[k]), p.shape[p.modes[k]], 1};
        if (p.transpose) matrix = {matrix.data, 1, p.rows[k]};
        chain.products.push_back({p.modes[k], matrix, p.rows[k]});
      }
      chains.push_back(chain);
    }
    mode_products(builder, chains, [](size_t, GemmProblem<T>&) {});
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
