// Launch plan of cross_gram: a matrix product over a long sum, which is cut into parts where the result has
// few tiles. The parts are added in order by a second product, with a row of ones.
#include <algorithm>

#include "cuda/gemm_table.h"
#include "cuda/operators.h"

namespace tk {
namespace {

// How many parts, and how much of the dimension that is cut belongs to each. It depends on the problem alone.
struct Parts {
  int64_t count, step;
};

Parts parts(const tk_cross_gram_problem& p) {
  constexpr int64_t shortest = 512, enough_tiles = 256;
  const int64_t depth = p.outer * p.inner, along = p.outer > 1 ? p.outer : p.inner;
  const int64_t tiles = GemmTable<float>::tiles(p.a_size, p.b_size);
  if (tiles == 0) return {1, along};
  const int64_t wanted = std::min(depth / shortest, enough_tiles / tiles);
  if (wanted <= 1) return {1, along};
  const int64_t step = (along + wanted - 1) / wanted;
  return {(along + step - 1) / step, step};
}

}  // namespace

tk_status cross_gram_plan(tk_dtype dtype, const tk_cross_gram_problem* problems, int64_t count,
                          void* workspace, const Device& device, Plan* plan) {
  const auto check = [](const tk_cross_gram_problem& p) {
    if (p.outer < 0 || p.inner < 0 || p.a_size < 0 || p.b_size < 0) return TK_INVALID_ARGUMENT;
    if (p.outer * p.inner >= largest_index || p.a_size * p.b_size >= largest_index) return TK_UNSUPPORTED;
    return TK_OK;
  };
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    const T* one = builder.initialised(std::vector<T>{T(1)});
    GemmTable<T> products, sums;
    for (int64_t i = 0; i < count; ++i) {
      const tk_cross_gram_problem& p = problems[i];
      const Parts cut = parts(p);
      const int64_t entries = p.a_size * p.b_size;
      T* to = cut.count > 1 ? builder.scratch<T>(cut.count * entries) : static_cast<T*>(p.out);
      const bool by_outer = p.outer > 1;
      const int64_t a_step = by_outer ? p.a_size * p.inner : 1, b_step = by_outer ? p.b_size * p.inner : 1;
      for (int64_t part = 0; part < cut.count; ++part) {
        const int64_t begin = part * cut.step, end = std::min(begin + cut.step, by_outer ? p.outer : p.inner);
        Matrix<T> a{static_cast<const T*>(p.a) + begin * a_step, p.inner, 1};
        Matrix<T> b{static_cast<const T*>(p.b) + begin * b_step, 1, p.inner};
        if (by_outer && p.inner == 1) a.col = p.a_size, b.row = p.b_size;
        GemmProblem<T>& g = products.add(p.a_size, p.b_size, (end - begin) * (by_outer ? p.inner : 1), a, b,
                                         to + part * entries, p.b_size);
        if (by_outer && p.inner > 1) {
          g.depth_inner = static_cast<int32_t>(p.inner);
          g.a_col_outer = a_step, g.b_row_outer = b_step;
        }
      }
      if (cut.count > 1)
        sums.add(1, entries, cut.count, {one, 0, 0}, {to, entries, 1}, static_cast<T*>(p.out), entries);
    }
    products.launch(builder);
    sums.launch(builder);
  };
  return plan_problems(dtype, problems, count, workspace, device, plan, check, build);
}

}  // namespace tk
