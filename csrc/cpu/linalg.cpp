#include "cpu/linalg.h"

#include <cmath>
#include <type_traits>

#include "core/scratch.h"
#include "cpu/isa.h"

namespace tk {

template <class T>
void multiply(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b,
              int64_t b_row, int64_t b_col, T beta, T* c, int64_t c_row) {
  if (m == 0 || n == 0) return;
  thread_local Buffer<T> scratch(gemm_scratch);  // reused by every product of this thread
  simd<T>().gemm({m, n, k, alpha, a, a_row, a_col, b, b_row, b_col, beta, c, c_row}, scratch);
}

template <class From, class To>
void transpose(int64_t rows, int64_t cols, const From* in, int64_t in_row, To* out, int64_t out_row) {
  if constexpr (std::is_same_v<From, To>) return simd<From>().transpose(rows, cols, in, in_row, out, out_row);
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += block)
    for (int64_t j0 = 0; j0 < cols; j0 += block)
      for (int64_t j = j0; j < cols && j < j0 + block; ++j)
        for (int64_t i = i0; i < rows && i < i0 + block; ++i)
          out[j * out_row + i] = static_cast<To>(in[i * in_row + j]);
}

template <class T>
double norm(int64_t n, const T* x) {
  const double sum = simd<T>().sum_squares(n, x);
  if (sum > 1e-280 && std::isfinite(sum)) return std::sqrt(sum);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(x[i])) return x[i];
    largest = std::fmax(largest, std::fabs(static_cast<double>(x[i])));
  }
  if (largest == 0 || std::isinf(largest)) return largest;
  double scaled = 0;
  for (int64_t i = 0; i < n; ++i) scaled += (x[i] / largest) * (x[i] / largest);
  return largest * std::sqrt(scaled);
}

#define TK_INSTANTIATE(T)                                                                                \
  template void multiply<T>(int64_t, int64_t, int64_t, T, const T*, int64_t, int64_t, const T*, int64_t, \
                            int64_t, T, T*, int64_t);                                                    \
  template double norm<T>(int64_t, const T*);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE
template void transpose<float, float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void transpose<float, double>(int64_t, int64_t, const float*, int64_t, double*, int64_t);
template void transpose<double, float>(int64_t, int64_t, const double*, int64_t, float*, int64_t);
template void transpose<double, double>(int64_t, int64_t, const double*, int64_t, double*, int64_t);

}  // namespace tk
