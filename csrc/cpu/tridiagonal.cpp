// Householder tridiagonalisation of a symmetric matrix,  A = Q T Qᵀ,  and multiplication by Q afterwards.
//
// Layout: row-major, upper triangle; one reflector per row. Panels of up to 32 columns (Dongarra, Sorensen &
// Hammarling 1989): half the operations are products of the trailing triangle with a vector, read once from
// cache per column; the other half is one product of rank 64 per panel. Numerics: T, backward stable; the
// multiplication by Q is in float64.
#include <algorithm>
#include <cmath>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {

template <class T>
void tridiagonalise(int64_t n, T* a, double* d, double* e, T* v, T* tau) {
  constexpr int64_t strip = 128;
  const int64_t nb = n <= 96    ? 8
                     : n <= 192 ? 16
                                : block_size;  // wide panels cost a small matrix more than they save
  const SimdTable<T>& simd_table = simd<T>();
  const int64_t step = padded<T>(n);
  Buffer<T> w(2 * nb * step), x(2 * nb * step);  // W, in the end [W; V], and [V; W]
  T s[block_size], q[block_size];
  std::fill_n(v, n * step, T(0));
  for (int64_t begin = 0; begin < n; begin += nb) {
    const int64_t end = std::min(n, begin + nb);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t done = j - begin, rest = n - j - 1;
      T* row = a + j * step + j;  // A − Vᵀ W − Wᵀ V is current; this row of it is brought up to date here
      for (int64_t k = 0; k < done; ++k) {
        s[k] = w[k * step + j];
        q[k] = v[(begin + k) * step + j];
      }
      simd_table.gemv_subtract(done, rest + 1, v + begin * step + j, step, s, row);
      simd_table.gemv_subtract(done, rest + 1, w + j, step, q, row);
      d[j] = row[0];
      if (rest == 0) break;
      T *own = v + j * step + j + 1, *y = w + done * step + j + 1;
      std::copy_n(row + 1, rest, own);
      e[j] = reflector<T>(rest, own, tau[j]);
      // y = tau (A v − Vᵀ(W v) − Wᵀ(V v)), then w = y − ½ tau (yᵀv) v.
      simd_table.symv(rest, a + (j + 1) * step + j + 1, step, own, y);
      simd_table.gemv(done, rest, w + j + 1, step, own, s);
      simd_table.gemv(done, rest, v + begin * step + j + 1, step, own, q);
      simd_table.gemv_subtract(done, rest, v + begin * step + j + 1, step, s, y);
      simd_table.gemv_subtract(done, rest, w + j + 1, step, q, y);
      T product;
      simd_table.gemv(1, rest, y, n, own, &product);
      const T half = T(0.5) * tau[j] * tau[j] * product;
      for (int64_t i = 0; i < rest; ++i) y[i] = tau[j] * y[i] - half * own[i];
    }
    const int64_t rank = end - begin, rest = n - end;
    if (rest == 0) break;
    // A −= Vᵀ W + Wᵀ V, as one product of stacked rows, strip by strip of the upper triangle.
    for (int64_t k = 0; k < rank; ++k) {
      std::copy_n(v + (begin + k) * step + end, rest, x + k * step);
      std::copy_n(w + k * step + end, rest, x + (rank + k) * step);
    }
    for (int64_t k = 0; k < rank; ++k) {
      std::copy_n(x + (rank + k) * step, rest, w + k * step);
      std::copy_n(x + k * step, rest, w + (rank + k) * step);
    }
    for (int64_t i = 0; i < rest; i += strip)
      multiply<T>(std::min(strip, rest - i), rest - i, 2 * rank, -1, x + i, 1, step, w + i, step, 1, 1,
                  a + (end + i) * step + end + i, step);
  }
  tau[n - 1] = 0;
}

template void tridiagonalise<float>(int64_t, float*, double*, double*, float*, float*);
template void tridiagonalise<double>(int64_t, double*, double*, double*, double*, double*);

void back_transform(int64_t count, int64_t n, const double* v, const double* tau, double* rows) {
  const int64_t step = padded<double>(n);
  double t[block_size * block_size];
  for (int64_t begin = (n - 1) / block_size * block_size; begin >= 0; begin -= block_size) {
    const int64_t w = std::min(block_size, n - begin);
    const double* own = v + begin * step + begin;
    block_factor(n - begin, w, own, step, tau + begin, t);
    apply_block(count, n - begin, w, own, step, t, true, rows + begin, n);
  }
}

}  // namespace tk
