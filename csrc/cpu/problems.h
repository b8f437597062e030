// Runs independent problems of different sizes on several threads, the dearest first.
//
// A problem is done by one thread from beginning to end, so its result does not depend on the number of
// threads; `share_problems` is for those whose result does not depend on it anyway.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>
#include <vector>

#include "core/dispatch.h"
#include "tucker_kernels.h"

namespace tk {

// body(i) for every i < cost.size(), largest cost first; running out of memory in a body ends as a status.
template <class F>
tk_status for_each_problem(const std::vector<double>& cost, [[maybe_unused]] int threads, F&& body) {
  const int64_t count = static_cast<int64_t>(cost.size());
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  [[maybe_unused]] const double total = std::accumulate(cost.begin(), cost.end(), 0.0);
  bool failed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(total < 1e5 ? 1 : threads)
  for (int64_t k = 0; k < count; ++k) {
    try {
      body(order[k]);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      failed = true;
    }
  }
  return failed ? TK_OUT_OF_MEMORY : TK_OK;
}

// body(i, threads), true unless memory ran out, for every problem: one thread each, or one problem after the
// other on all threads where there are fewer problems than threads.
template <class F>
tk_status share_problems(const std::vector<double>& cost, int threads, F&& body) {
  if (static_cast<int64_t>(cost.size()) >= threads)
    return for_each_problem(cost, threads, [&](int64_t i) {
      if (!body(i, 1)) throw std::bad_alloc();
    });
  for (size_t i = 0; i < cost.size(); ++i)
    if (!body(static_cast<int64_t>(i), threads)) return TK_OUT_OF_MEMORY;
  return TK_OK;
}

// A whole operator on a table of problems, one thread each: allowed(p) says whether the sizes of a problem
// are valid, cost(p) how much work it is, and body(zero, i) does problem i in the type of zero.
template <class Problem, class Allowed, class Cost, class Body>
tk_status run_problems(tk_dtype dtype, const Problem* problems, int64_t count, int threads, Allowed&& allowed,
                       Cost&& cost, Body&& body) {
  if (count < 0 || threads < 1 || !std::all_of(problems, problems + count, allowed))
    return TK_INVALID_ARGUMENT;
  std::vector<double> costs(count);
  std::transform(problems, problems + count, costs.begin(), cost);
  return dispatch(
      dtype, [&](auto zero) { return for_each_problem(costs, threads, [&](int64_t i) { body(zero, i); }); });
}

}  // namespace tk
