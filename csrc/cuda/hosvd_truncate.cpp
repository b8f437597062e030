// Launch plan of hosvd_truncate: eigenvectors of every mode's Gram matrix with the rank chosen on the device,
// the core in those bases, and the exact error by going back. Capacities are host values; everything beyond a
// rank is zero.
//
// Given ranks are cut on the host where one exceeds the product of the others, ranks chosen by tolerance in
// the last kernel.
#include <algorithm>

#include "cuda/eigenbasis.h"
#include "cuda/mode_products.h"
#include "cuda/operators.h"

namespace tk {
namespace {

tk_status check(const tk_hosvd_truncate_problem& p, int64_t width) {
  if (p.modes < 1 || p.modes > TK_MAX_MODES || p.modes > width) return TK_INVALID_ARGUMENT;
  int64_t elements = 1;
  for (int64_t d = 0; d < p.modes; ++d) {
    if (p.shape[d] < 1 || p.min_rank[d] < 0 || p.max_rank[d] < 0) return TK_INVALID_ARGUMENT;
    if (p.truncated[d] && p.shape[d] > largest_factorization) return TK_UNSUPPORTED;
    elements *= p.shape[d];
    if (elements >= largest_index) return TK_UNSUPPORTED;
  }
  return TK_OK;
}

struct Bounds {
  int64_t least[TK_MAX_MODES], most[TK_MAX_MODES];
};

// Rank bounds by mode: those given, within the sizes, and no more than the product of the others' upper
// bounds. Cutting one to that leaves no other above its own product.
Bounds rank_bounds(const tk_hosvd_truncate_problem& p, bool fixed) {
  Bounds b{};
  for (int64_t d = 0; d < p.modes; ++d) {
    const bool cut = p.truncated[d] != 0;
    b.least[d] = cut ? std::min(p.min_rank[d], p.shape[d]) : p.shape[d];
    b.most[d] = cut ? std::max(std::min(p.max_rank[d], p.shape[d]), b.least[d]) : p.shape[d];
  }
  for (int64_t d = 0; d < p.modes; ++d) {
    if (!p.truncated[d]) continue;
    int64_t others = 1;
    for (int64_t e = 0; e < p.modes; ++e) others *= e == d ? 1 : b.most[e];
    b.most[d] = std::min(b.most[d], others);
  }
  for (int64_t d = 0; d < p.modes; ++d) b.least[d] = fixed ? b.most[d] : std::min(b.least[d], b.most[d]);
  return b;
}

// Doubles that cutting an infeasible rank may need; 0 where the bounds exclude one.
int64_t finish_work(const tk_hosvd_truncate_problem& p, const Bounds& bounds) {
  int64_t most = 0;
  for (int64_t d = 0; d < p.modes; ++d) {
    if (!p.truncated[d]) continue;
    int64_t least_others = 1, most_others = 1;
    for (int64_t e = 0; e < p.modes; ++e) {
      if (e == d) continue;
      least_others *= bounds.least[e];
      most_others *= bounds.most[e];
    }
    if (bounds.most[d] <= least_others) continue;
    const int64_t columns = std::min(bounds.most[d] - 1, most_others);
    most = std::max(most, (bounds.most[d] + p.shape[d] + 3) * columns);
  }
  return most;
}

}  // namespace

tk_status hosvd_truncate_plan(tk_dtype dtype, const tk_hosvd_truncate_problem* problems, int64_t count,
                              void* workspace, const Device& device, Plan* plan, const double* tol,
                              int per_mode, int64_t* ranks, int64_t width, double* errors) {
  const auto build = [&](auto zero, PlanBuilder& builder) {
    using T = decltype(zero);
    int32_t* flags = builder.initialised(std::vector<int32_t>(count));
    int64_t* found = builder.initialised(std::vector<int64_t>(int64_t{count} * TK_MAX_MODES, -1));
    std::vector<Eigenproblem<T>> eigen;
    std::vector<ModeProducts<T>> forth, back;
    std::vector<int64_t> owner;  // of each chain
    std::vector<FinishProblem<T>> finishes;
    GemmTable<T> copies;
    for (int64_t c = 0; c < count; ++c) {
      const tk_hosvd_truncate_problem& p = problems[c];
      const T* core = static_cast<const T*>(p.core);
      T* new_core = static_cast<T*>(p.new_core);
      const Bounds bounds = rank_bounds(p, tol[c] < 0);
      double* trace = builder.scratch<double>(1);
      ModeProducts<T> out{core, new_core, {p.shape, p.shape + p.modes}, {}},
          in{new_core, nullptr, out.shape, {}};
      int64_t elements = 1, cut = 0;
      for (int64_t d = 0; d < p.modes; ++d) {
        elements *= p.shape[d];
        cut += p.truncated[d] != 0;
      }
      Eigenproblem<T> e{};
      e.flag = flags + c;
      e.on_flag = OnFlag::identity;
      for (int64_t d = 0, seen = 0; d < p.modes; ++d) {
        if (!p.truncated[d]) continue;
        int64_t outer = 1, inner = 1;
        for (int64_t f = 0; f < d; ++f) outer *= p.shape[f];
        for (int64_t f = d + 1; f < p.modes; ++f) inner *= p.shape[f];
        const int64_t n = p.shape[d];
        e.a = {core, inner, inner == 1 ? n : 1};
        e.inner = outer > 1 && inner > 1 ? inner : 0;
        e.col_outer = n * inner;
        e.size = n, e.depth = outer * inner;
        e.basis = static_cast<T*>(p.projection[d]);
        e.trace = seen++ ? nullptr : trace;
        e.rank = found + c * TK_MAX_MODES + d;
        e.bound = tol[c] < 0 ? -1 : tol[c] * tol[c] / (per_mode ? 1 : cut);
        e.min_rank = static_cast<int32_t>(bounds.least[d]);
        e.max_rank = static_cast<int32_t>(bounds.most[d]);
        eigen.push_back(e);
        const Matrix<T> projection{e.basis, n, 1};
        out.products.push_back({d, projection.transposed(), n});
        in.products.push_back({d, projection, n});
      }
      if (cut == 0) {  // only whether it is finite
        e.a = {core, 0, 1};
        e.size = 1, e.depth = elements;
        e.trace = trace;
        eigen.push_back(e);
        GemmProblem<T>& copy = copies.add(1, elements, 0, {}, {}, new_core, elements);
        copy.source = core, copy.beta = 1;
      } else {
        owner.push_back(c);
        forth.push_back(out);
        back.push_back(in);
      }
      FinishProblem<T> finish{};
      finish.trace = trace, finish.flag = flags + c, finish.error = errors + c;
      finish.ranks = ranks + c * width, finish.found = found + c * TK_MAX_MODES;
      finish.modes = static_cast<int32_t>(p.modes), finish.width = static_cast<int32_t>(width);
      finish.core = new_core;
      if (const int64_t doubles = finish_work(p, bounds)) finish.work = builder.scratch<double>(doubles);
      for (int64_t d = 0; d < p.modes; ++d) {
        finish.size[d] = static_cast<int32_t>(p.shape[d]);
        finish.projections[d] = p.truncated[d] ? static_cast<T*>(p.projection[d]) : nullptr;
      }
      finishes.push_back(finish);
    }
    eigenbases(builder, eigen);
    copies.launch(builder);
    mode_products(builder, forth, [&](size_t i, GemmProblem<T>& last) {
      last.source = static_cast<const T*>(problems[owner[i]].core);
      last.flag = flags + owner[i];
      last.on_flag = OnFlag::source;
    });
    mode_products(builder, back, [&](size_t i, GemmProblem<T>& last) {
      last.source = static_cast<const T*>(problems[owner[i]].core);
      last.alpha = -1, last.beta = 1;
      const int64_t tiles = GemmTable<T>::tiles(last.m, last.n);
      last.squares = builder.scratch<double>(tiles);
      finishes[owner[i]].squares = last.squares;
      finishes[owner[i]].tiles = static_cast<int32_t>(tiles);
    });
    builder.one_block_each(Kernel::finish_truncation, finishes, finish_threads, 0);
  };
  const auto fits = [&](const tk_hosvd_truncate_problem& p) { return check(p, width); };
  return plan_problems(dtype, problems, count, workspace, device, plan, fits, build);
}

}  // namespace tk
