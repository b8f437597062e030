// Gram matrices of the modes of one core:  G[k,l] = Σ_{o,i} x[o,k,i] x[o,l,i].
//
// The first and the last mode are read in place by strides. A mode in the middle is copied once to (outer,
// inner, n), so that it becomes one long product too (simd/gram.cpp).
#include "cpu/core_tensor.h"

#include <algorithm>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

// (outer, n, inner) → (outer, inner, n)
template <class T>
void inner_first(const T* x, int64_t outer, int64_t n, int64_t inner, T* out) {
  for (int64_t o = 0; o < outer; ++o) transpose(n, inner, x + o * n * inner, inner, out + o * n * inner, n);
}

}  // namespace

template <class T>
void gram_strip(int64_t n, int64_t columns, int64_t k, const T* a, int64_t row, int64_t col, bool exact,
                double* gram) {
  thread_local Buffer<double> scratch(gram_scratch);
  (exact ? simd<T>().gram : simd<T>().gram_in_t)(n, columns, k, a, row, col, gram, columns, scratch);
}

template <class T>
void mode_gram(const T* x, int64_t outer, int64_t n, int64_t inner, bool exact, double* gram) {
  if (outer == 1) return gram_strip(n, n, inner, x, inner, int64_t(1), exact, gram);
  if (inner == 1) return gram_strip(n, n, outer, x, int64_t(1), n, exact, gram);
  Buffer<T> copy(outer * n * inner);
  inner_first(x, outer, n, inner, copy.data());
  gram_strip<T>(n, n, outer * inner, copy, 1, n, exact, gram);
}

template <class T>
void unfold(const T* x, int64_t outer, int64_t n, int64_t inner, double* out) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t o = 0; o < outer; ++o)
      std::copy_n(x + (o * n + k) * inner, inner, out + (k * outer + o) * inner);
}

#define TK_INSTANTIATE(T)                                                                            \
  template void gram_strip<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, bool, double*); \
  template void mode_gram<T>(const T*, int64_t, int64_t, int64_t, bool, double*);                    \
  template void unfold<T>(const T*, int64_t, int64_t, int64_t, double*);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk
