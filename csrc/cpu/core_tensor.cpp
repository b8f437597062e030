// Mode Gram matrices and mode products of one core:
//     G[k,l] = Σ_{o,i} x[o,k,i] x[o,l,i],        y[o,r,i] = Σ_k M[r,k] x[o,k,i].
//
// The first and the last mode are read in place by strides. A mode in the middle with a short run behind it
// (a window of nine) would give products nine columns wide, so it is copied once to (outer, inner, n) and
// becomes one long product. Numerics: Gram matrices are products and sums in float64, mode products run in T.
#include "cpu/core_tensor.h"

#include <algorithm>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr int64_t long_run = 64;

// (outer, n, inner) → (outer, inner, n)
template <class T>
void inner_first(const T* x, int64_t outer, int64_t n, int64_t inner, T* out) {
  for (int64_t o = 0; o < outer; ++o) transpose(n, inner, x + o * n * inner, inner, out + o * n * inner, n);
}

}  // namespace

template <class T>
void mode_gram(const T* x, int64_t outer, int64_t n, int64_t inner, double* gram) {
  thread_local Buffer<double> scratch(gram_scratch);
  const auto run = [&](int64_t k, const T* a, int64_t row, int64_t col) {
    simd<T>().gram(n, k, a, row, col, gram, n, scratch);
  };
  if (outer == 1) return run(inner, x, inner, 1);
  if (inner == 1) return run(outer, x, 1, n);
  Buffer<T> copy(outer * n * inner);
  inner_first(x, outer, n, inner, copy.data());
  run(outer * inner, copy, 1, n);
}

template <class T>
void mode_product(const T* x, int64_t outer, int64_t n, int64_t inner, const T* matrix, int64_t rows,
                  int64_t row, int64_t col, T* y) {
  if (inner == 1) return multiply<T>(outer, rows, n, 1, x, n, 1, matrix, col, row, 0, y, rows);
  if (outer == 1 || inner >= long_run) {
    for (int64_t o = 0; o < outer; ++o)
      multiply<T>(rows, inner, n, 1, matrix, row, col, x + o * n * inner, inner, 1, 0, y + o * rows * inner,
                  inner);
    return;
  }
  Buffer<T> copy(outer * n * inner), product(outer * rows * inner);
  inner_first(x, outer, n, inner, copy.data());
  multiply<T>(outer * inner, rows, n, 1, copy, n, 1, matrix, col, row, 0, product, rows);
  inner_first(product.data(), outer, inner, rows, y);
}

template <class T>
void unfold(const T* x, int64_t outer, int64_t n, int64_t inner, double* out) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t o = 0; o < outer; ++o)
      std::copy_n(x + (o * n + k) * inner, inner, out + (k * outer + o) * inner);
}

#define TK_INSTANTIATE(T)                                                                                 \
  template void mode_gram<T>(const T*, int64_t, int64_t, int64_t, double*);                               \
  template void mode_product<T>(const T*, int64_t, int64_t, int64_t, const T*, int64_t, int64_t, int64_t, \
                                T*);                                                                      \
  template void unfold<T>(const T*, int64_t, int64_t, int64_t, double*);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk
