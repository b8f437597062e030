// Runs independent problems of different sizes on several threads, the dearest first.
//
// A problem is done by one thread from beginning to end, so its result does not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>
#include <vector>

#include "tucker_kernels.h"

namespace tk {

// body(i) for every i < cost.size(), largest cost first; running out of memory in a body ends as a status.
template <class F>
tk_status for_each_problem(const std::vector<double>& cost, int threads, F&& body) {
  const int64_t count = static_cast<int64_t>(cost.size());
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
  const double total = std::accumulate(cost.begin(), cost.end(), 0.0);
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

}  // namespace tk
