// Cholesky factor of a positive semidefinite matrix, in float64:  G = L Lᵀ, pivots at rounding level skipped.
//
// Layout: row j of `lt` is column j of L, so every inner loop streams over unit stride. Left-looking in
// blocks of 32 rows: one product subtracts all finished rows from a block, a matrix-vector product finishes
// each row inside it. Numerics: float64. A pivot not above `tolerance` leaves a zero row; its remainder is
// returned, because it is the energy the factor misses. No pivot search: the caller sorts the diagonal.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {

double semidefinite_cholesky(int64_t n, const double* g, double tolerance, double* lt) {
  constexpr int64_t nb = 32;
  const int64_t step = padded<double>(n);
  double s[nb], skipped = 0;
  std::fill_n(lt, n * step, 0.0);
  for (int64_t begin = 0; begin < n; begin += nb) {
    const int64_t end = std::min(n, begin + nb);
    for (int64_t j = begin; j < end; ++j) std::copy_n(g + j * n + begin, n - begin, lt + j * step + begin);
    if (begin > 0)
      multiply<double>(end - begin, n - begin, begin, -1, lt + begin, 1, step, lt + begin, step, 1, 1,
                       lt + begin * step + begin, step);
    for (int64_t j = begin; j < end; ++j) {
      double* row = lt + j * step;
      for (int64_t k = begin; k < j; ++k) s[k - begin] = lt[k * step + j];
      simd<double>().gemv_subtract(j - begin, n - j, lt + begin * step + j, step, s, row + j);
      const double pivot = row[j];
      std::fill(row + begin, row + j, 0.0);
      if (!(pivot > tolerance)) {
        skipped += std::max(pivot, 0.0);
        std::fill(row + j, row + n, 0.0);
        continue;
      }
      const double scale = 1 / std::sqrt(pivot);
      for (int64_t i = j; i < n; ++i) row[i] *= scale;
    }
  }
  return skipped;
}

}  // namespace tk
