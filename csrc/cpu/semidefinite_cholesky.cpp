// Cholesky factor of a positive semidefinite matrix:  G = L Lᵀ, pivots at rounding level skipped.
//
// Layout: row j of `lt` is column j of L, so every inner loop streams over unit stride. Left-looking in
// blocks of 32 rows: one product subtracts all finished rows from a block, a matrix-vector product finishes
// each row inside it. Numerics: T. A pivot not above `tolerance` leaves a zero row; its remainder is
// returned, because it is the energy the factor misses. No pivot search: the caller sorts the diagonal.
#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {

template <class T>
double semidefinite_cholesky(int64_t n, const T* g, double tolerance, T* lt) {
  constexpr int64_t nb = 32;
  const int64_t step = padded<T>(n);
  T s[nb];
  double skipped = 0;
  std::fill_n(lt, n * step, T(0));
  for (int64_t begin = 0; begin < n; begin += nb) {
    const int64_t end = std::min(n, begin + nb);
    for (int64_t j = begin; j < end; ++j) std::copy_n(g + j * n + begin, n - begin, lt + j * step + begin);
    if (begin > 0)
      multiply<T>(end - begin, n - begin, begin, -1, lt + begin, 1, step, lt + begin, step, 1, 1,
                  lt + begin * step + begin, step);
    for (int64_t j = begin; j < end; ++j) {
      T* row = lt + j * step;
      for (int64_t k = begin; k < j; ++k) s[k - begin] = lt[k * step + j];
      simd<T>().gemv_subtract(j - begin, n - j, lt + begin * step + j, step, s, row + j);
      const T pivot = row[j];
      std::fill(row + begin, row + j, T(0));
      if (!(pivot > tolerance)) {
        skipped += std::max(pivot, T(0));
        std::fill(row + j, row + n, T(0));
        continue;
      }
      const T scale = 1 / std::sqrt(pivot);
      for (int64_t i = j; i < n; ++i) row[i] *= scale;
    }
  }
  return skipped;
}

template double semidefinite_cholesky<float>(int64_t, const float*, double, float*);
template double semidefinite_cholesky<double>(int64_t, const double*, double, double*);

}  // namespace tk
