// Splits a range among OpenMP threads. A compiler without OpenMP leaves one, and skips the pragmas.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

namespace tk {

// Multiply-adds that one thread does in about the time that waking a second one takes (some ten
// microseconds).
constexpr int64_t parallel_work = 1 << 19;

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The part of [0, size) that belongs to `index` of `count`: whole multiples of `grain`, nearly equal.
inline Range part_of(int64_t size, int64_t grain, int64_t index, int64_t count) {
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t begin = index * grains / count * grain, end = (index + 1) * grains / count * grain;
  return {begin < size ? begin : size, end < size ? end : size};
}

// Calls f(range) once per thread with its part of [0, size); returns false if any call does. f must give the
// same result however the range is cut, so that results do not depend on the number of threads.
template <class F>
bool parallel_for(int64_t size, int64_t grain, int threads, F&& f) {
  if (threads == 1 || size <= grain) return size <= 0 || f(Range{0, size});
  bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
  {
    const Range range = part_of(size, grain, omp_get_thread_num(), omp_get_num_threads());
    if (range.begin < range.end) good = f(range);
  }
  return good;
}

}  // namespace tk
