// Projection of one mode and the norm of what is left:  Y = P X,  |X − PᵀY|².
//
// The difference |X|² − |Y|² would lose a small loss in rounding. Where P nearly keeps `rows` of the
// coordinates (the head H of X; after a small step in training), the others (the tail E) hold nearly all of
// the residual: with P = [P_H P_E] it is Z_E = E − P_EᵀY there and −P_H⁻¹ P_E Z_E in the head, so that
//     |Z_E|² ≤ |X − PᵀY|² ≤ |Z_E|² (1 + t²),  t the tangent of the largest angle,
// and only the tail is formed. Layout: some 256 columns at a time are gathered, head first, and stay in the
// second-level cache for both products. Numerics: products in T, the sum in float64.
#include "cpu/projection.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr double small_tangent = 1e-3;  // squared; half of it is what the norm of the loss may be off by

}  // namespace

template <class T>
double project_and_measure(int64_t outer, int64_t n, int64_t inner, int64_t rows, const T* p, const T* x,
                           T* y) {
  constexpr int64_t chunk = 256;
  const auto copy = simd<T>().copy;
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const auto head = std::stable_partition(order.begin(), order.end(), [&](int64_t k) {
    double kept = 0;
    for (int64_t r = 0; r < rows; ++r) kept += static_cast<double>(p[r * n + k]) * p[r * n + k];
    return kept > 0.5;
  });
  Buffer<T> ordered(rows * n);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < n; ++k) ordered[r * n + k] = p[r * n + order[k]];
  int64_t begin = 0;  // of the coordinates in which the residual is formed
  if (rows < n && head - order.begin() == rows) {
    Buffer<T> sines(rows * rows);
    const T* tail = ordered + rows;
    multiply<T>(rows, rows, n - rows, 1, tail, n, 1, tail, 1, n, 0, sines, rows);
    if (norm(rows * rows, sines.data()) <= small_tangent) begin = rows;
  }
  const int64_t piece = std::min(inner, chunk), group = std::min(outer, (chunk + inner - 1) / inner);
  Buffer<T> gathered(n * group * piece), product(rows * group * piece);
  double lost = 0;
  for (int64_t o = 0; o < outer; o += group)
    for (int64_t i = 0; i < inner; i += piece) {
      const int64_t count = std::min(group, outer - o), size = std::min(piece, inner - i),
                    width = count * size;
      T* residual = gathered + begin * width;
      for (int64_t k = 0; k < n; ++k)
        copy(count, size, x + (o * n + order[k]) * inner + i, n * inner, gathered + k * width, size);
      multiply<T>(rows, width, n, 1, ordered, n, 1, gathered, width, 1, 0, product, width);
      for (int64_t r = 0; r < rows; ++r)
        copy(count, size, product + r * width, size, y + (o * rows + r) * inner + i, rows * inner);
      multiply<T>(n - begin, width, rows, -1, ordered + begin, 1, n, product, width, 1, 1, residual, width);
      lost += simd<T>().sum_squares((n - begin) * width, residual);
    }
  return lost;
}

template double project_and_measure<float>(int64_t, int64_t, int64_t, int64_t, const float*, const float*,
                                           float*);
template double project_and_measure<double>(int64_t, int64_t, int64_t, int64_t, const double*, const double*,
                                            double*);

}  // namespace tk
