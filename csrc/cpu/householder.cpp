// Householder QR in blocks:  A = Q R,  Q = Π_b (I − V_b T_b V_bᵀ),  R's diagonal made non-negative.
//
// Layout: one column of A per row of `at`. Blocks of 32 reflectors: inside a block matrix-vector products,
// behind it two products with the compact WY form (Schreiber & Van Loan 1989). Numerics: products in T, norms
// and the scalars of a reflector in float64; Q is orthonormal to rounding whatever A is.
#include <algorithm>
#include <cmath>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr int64_t nb = 32;

// Turns x (length n) into a reflector with v[0] = 1; (I − tau v vᵀ) x = beta e_0.
template <class T>
double reflector(int64_t n, T* x, double& tau) {
  const double tail = n > 1 ? norm(n - 1, x + 1) : 0, first = x[0];
  tau = 0;
  x[0] = 1;
  if (tail == 0) return first;
  const double beta = -std::copysign(std::hypot(first, tail), first);
  tau = (beta - first) / beta;
  for (int64_t i = 1; i < n; ++i) x[i] = static_cast<T>(x[i] / (first - beta));
  return beta;
}

// rows (count×m, row stride) −= (rows Vᵀ) T V, or with Tᵀ. V: w rows of length m, stride v_row; T is nb×nb.
template <class T>
void apply_block(int64_t count, int64_t m, int64_t w, const T* v, int64_t v_row, const T* t, bool transposed,
                 T* rows, int64_t row, T* y, T* z) {
  if (count == 0) return;
  multiply<T>(count, w, m, 1, rows, row, 1, v, 1, v_row, 0, y, w);
  multiply<T>(count, w, w, -1, y, w, 1, t, transposed ? 1 : nb, transposed ? nb : 1, 0, z, w);
  multiply<T>(count, m, w, 1, z, w, 1, v, v_row, 1, 1, rows, row);
}

}  // namespace

template <class T>
void householder_qr(int64_t m, int64_t n, T* at, T* qt, T* r) {
  const int64_t k = std::min(m, n), blocks = (k + nb - 1) / nb;
  Buffer<T> v(k * m), t(blocks * nb * nb), y(n * nb), z(n * nb), diagonal(k), s(nb);
  std::fill_n(v.data(), k * m, T(0));
  std::fill_n(t.data(), blocks * nb * nb, T(0));
  for (int64_t begin = 0; begin < k; begin += nb) {
    const int64_t w = std::min(nb, k - begin);
    T* tb = t.data() + begin / nb * nb * nb;
    for (int64_t j = begin; j < begin + w; ++j) {
      double tau;
      T* column = at + j * m + j;
      diagonal[j] = static_cast<T>(reflector(m - j, column, tau));
      std::copy_n(column, m - j, v.data() + j * m + j);
      for (int64_t c = j + 1; c < begin + w; ++c) {
        simd<T>().gemv(1, m - j, at + c * m + j, m, column, s);
        s[0] = static_cast<T>(s[0] * tau);
        simd<T>().gemv_subtract(1, m - j, column, m, s, at + c * m + j);
      }
      const int64_t before = j - begin;  // T[:, j] = −tau T (Vᵀ v_j)
      simd<T>().gemv(before, m - j, v.data() + begin * m + j, m, column, s);
      for (int64_t i = 0; i < before; ++i) {
        double sum = 0;
        for (int64_t q = i; q < before; ++q) sum += static_cast<double>(tb[i * nb + q]) * s[q];
        tb[i * nb + before] = static_cast<T>(-tau * sum);
      }
      tb[before * nb + before] = static_cast<T>(tau);
    }
    apply_block<T>(n - begin - w, m - begin, w, v.data() + begin * m + begin, m, tb, false,
                   at + (begin + w) * m + begin, m, y, z);
  }
  std::fill_n(qt, k * m, T(0));
  for (int64_t i = 0; i < k; ++i) qt[i * m + i] = 1;
  for (int64_t begin = (blocks - 1) * nb; begin >= 0; begin -= nb)
    apply_block<T>(k - begin, m - begin, std::min(nb, k - begin), v.data() + begin * m + begin, m,
                   t.data() + begin / nb * nb * nb, true, qt + begin * m + begin, m, y, z);
  for (int64_t i = 0; i < k; ++i) {
    const T sign = diagonal[i] < 0 ? T(-1) : T(1);
    for (int64_t j = 0; j < n; ++j)
      r[i * n + j] = j < i ? T(0) : sign * (j == i ? diagonal[i] : at[j * m + i]);
    if (sign < 0)
      for (int64_t j = 0; j < m; ++j) qt[i * m + j] = -qt[i * m + j];
  }
}

template void householder_qr<float>(int64_t, int64_t, float*, float*, float*);
template void householder_qr<double>(int64_t, int64_t, double*, double*, double*);

}  // namespace tk
