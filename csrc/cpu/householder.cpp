// Householder reflectors in blocks, and the QR made of them:  A = Q R,  Q = Π_b (I − V_b T_b V_bᵀ),  R's
// diagonal made non-negative.
//
// Layout: one column of A per row of `at`, one reflector per row of V. Blocks of 32 reflectors: inside a
// block matrix-vector products, behind it three products with the compact WY form (Schreiber & Van Loan
// 1989). Numerics: float64; Q is orthonormal to rounding whatever A is.
#include <algorithm>
#include <cmath>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {

template <class T>
double reflector(int64_t n, T* x, T& tau) {
  const double tail = n > 1 ? norm(n - 1, x + 1) : 0, first = x[0];
  tau = 0;
  x[0] = 1;
  if (tail == 0) return first;
  const double beta = -std::copysign(std::hypot(first, tail), first);
  const double scale = 1 / (first - beta);
  tau = static_cast<T>((beta - first) / beta);
  if (std::isfinite(static_cast<T>(scale)))
    for (int64_t i = 1; i < n; ++i) x[i] *= static_cast<T>(scale);
  else
    for (int64_t i = 1; i < n; ++i) x[i] = static_cast<T>(x[i] / (first - beta));
  return beta;
}

template double reflector<float>(int64_t, float*, float&);
template double reflector<double>(int64_t, double*, double&);

void block_factor(int64_t m, int64_t w, const double* v, int64_t v_row, const double* tau, double* t) {
  double products[block_size * block_size];
  multiply<double>(w, w, m, 1, v, v_row, 1, v, 1, v_row, 0, products, w);
  std::fill_n(t, block_size * block_size, 0.0);
  for (int64_t j = 0; j < w; ++j) {  // T[:, j] = −tau_j T (V v_j)
    for (int64_t i = 0; i < j; ++i) {
      double sum = 0;
      for (int64_t q = i; q < j; ++q) sum += t[i * block_size + q] * products[q * w + j];
      t[i * block_size + j] = -tau[j] * sum;
    }
    t[j * block_size + j] = tau[j];
  }
}

void apply_block(int64_t count, int64_t m, int64_t w, const double* v, int64_t v_row, const double* t,
                 bool transposed, double* rows, int64_t row) {
  if (count == 0) return;
  Buffer<double> y(2 * count * w);
  double* z = y + count * w;
  multiply<double>(count, w, m, 1, rows, row, 1, v, 1, v_row, 0, y, w);
  multiply<double>(count, w, w, -1, y, w, 1, t, transposed ? 1 : block_size, transposed ? block_size : 1, 0,
                   z, w);
  multiply<double>(count, m, w, 1, z, w, 1, v, v_row, 1, 1, rows, row);
}

void householder_qr(int64_t m, int64_t n, double* at, double* qt, double* r) {
  constexpr int64_t nb = block_size;
  const int64_t k = std::min(m, n), blocks = (k + nb - 1) / nb;
  Buffer<double> v(k * m), t(blocks * nb * nb), diagonal(k);
  std::fill_n(v.data(), k * m, 0.0);
  for (int64_t begin = 0; begin < k; begin += nb) {
    const int64_t w = std::min(nb, k - begin);
    double tau[nb];
    for (int64_t j = begin; j < begin + w; ++j) {
      double *column = v + j * m + j, product;
      std::copy_n(at + j * m + j, m - j, column);
      diagonal[j] = (reflector<double>(m - j, column, tau[j - begin]));
      for (int64_t c = j + 1; c < begin + w; ++c) {
        simd<double>().gemv(1, m - j, at + c * m + j, m, column, &product);
        product = (product * tau[j - begin]);
        simd<double>().gemv_subtract(1, m - j, column, m, &product, at + c * m + j);
      }
    }
    double *own = v + begin * m + begin, *factor = t + begin * nb;
    block_factor(m - begin, w, own, m, tau, factor);
    apply_block(n - begin - w, m - begin, w, own, m, factor, false, at + (begin + w) * m + begin, m);
  }
  std::fill_n(qt, k * m, 0.0);
  for (int64_t i = 0; i < k; ++i) qt[i * m + i] = 1;
  for (int64_t begin = (blocks - 1) * nb; begin >= 0; begin -= nb)
    apply_block(k - begin, m - begin, std::min(nb, k - begin), v + begin * m + begin, m, t + begin * nb, true,
                qt + begin * m + begin, m);
  for (int64_t i = 0; i < k; ++i) {
    const double sign = diagonal[i] < 0 ? -1 : 1;
    for (int64_t j = 0; j < n; ++j)
      r[i * n + j] = j < i ? 0.0 : sign * (j == i ? diagonal[i] : at[j * m + i]);
    if (sign < 0)
      for (int64_t j = 0; j < m; ++j) qt[i * m + j] = -qt[i * m + j];
  }
}

}  // namespace tk
