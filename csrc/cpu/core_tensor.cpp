// Gram matrices of the modes of one core:  G[k,l] = Σ_{o,i} x[o,k,i] x[o,l,i].
//
// The first and the last mode are read in place by strides. A mode in the middle is copied once to (outer,
// inner, n), so that it becomes one long product too. Only blocks on and below the diagonal are computed, in
// strips of 64 rows and 512 terms (128 rows waste more above the diagonal: 7 % slower, measured). Numerics:
// float64, or sums of 512 terms in T added up in float64: then an entry is off by some √512 u of |x_k||x_l|,
// and the energy of a tail by far less than 1e-6 of the whole.
#include "cpu/core_tensor.h"

#include <algorithm>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr int64_t strip = 64, depth = 512;

// (outer, n, inner) → (outer, inner, n)
template <class T>
void inner_first(const T* x, int64_t outer, int64_t n, int64_t inner, T* out) {
  for (int64_t o = 0; o < outer; ++o) transpose(n, inner, x + o * n * inner, inner, out + o * n * inner, n);
}

}  // namespace

template <class T>
void gram_strip(int64_t n, int64_t columns, int64_t k, const T* a, int64_t row, int64_t col, double* gram) {
  Buffer<T> part(strip * columns);
  std::fill_n(gram, n * columns, 0.0);
  for (int64_t p = 0; p < k; p += depth)
    for (int64_t i = 0; i < n; i += strip) {
      const int64_t rows = std::min(strip, n - i), width = std::min(i + rows, columns);
      const T* own = a + p * col;
      multiply<T>(rows, width, std::min(depth, k - p), 1, own + i * row, row, col, own, col, row, 0, part,
                  width);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; ++c) gram[(i + r) * columns + c] += part[r * width + c];
    }
}

template <class T>
void mode_gram(const T* x, int64_t outer, int64_t n, int64_t inner, bool exact, double* gram) {
  thread_local Buffer<double> scratch(gram_scratch);
  const auto run = [&](int64_t k, const T* a, int64_t row, int64_t col) {
    if (exact) return simd<T>().gram(n, k, a, row, col, gram, n, scratch);
    gram_strip(n, n, k, a, row, col, gram);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j) gram[i * n + j] = gram[j * n + i];
  };
  if (outer == 1) return run(inner, x, inner, 1);
  if (inner == 1) return run(outer, x, 1, n);
  Buffer<T> copy(outer * n * inner);
  inner_first(x, outer, n, inner, copy.data());
  run(outer * inner, copy, 1, n);
}

template <class T>
void unfold(const T* x, int64_t outer, int64_t n, int64_t inner, double* out) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t o = 0; o < outer; ++o)
      std::copy_n(x + (o * n + k) * inner, inner, out + (k * outer + o) * inner);
}

#define TK_INSTANTIATE(T)                                                                      \
  template void gram_strip<T>(int64_t, int64_t, int64_t, const T*, int64_t, int64_t, double*); \
  template void mode_gram<T>(const T*, int64_t, int64_t, int64_t, bool, double*);              \
  template void unfold<T>(const T*, int64_t, int64_t, int64_t, double*);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk
