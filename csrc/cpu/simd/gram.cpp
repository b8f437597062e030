// Gram matrix in float64:  G[i,j] = Σ_p A[i,p] A[j,p],  A is n×k in T with any strides, G full and symmetric.
//
// Blocks of 64 rows and 256 columns of A are widened to float64 and multiplied with `gemm`; only blocks on
// and below the diagonal are computed (half the operations), the rest is mirrored. Numerics: products and
// sums in float64, in order of k.
#include "cpu/simd/gemm.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t nb = 64, kc = 256;
static_assert(gemm_scratch + 2 * nb * kc <= gram_scratch, "scratch too small");

template <class T>
void widen(const T* a, int64_t row, int64_t col, int64_t rows, int64_t k, double* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < k; ++p) out[i * kc + p] = a[i * row + p * col];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

template <class T>
void gram(int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out, int64_t out_row,
          double* scratch) {
  double *left = scratch + gemm_scratch, *right = left + nb * kc;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) out[i * out_row + j] = 0;
  for (int64_t p = 0; p < k; p += kc) {
    const int64_t depth = least(kc, k - p);
    for (int64_t j = 0; j < n; j += nb) {
      const int64_t cols = least(nb, n - j);
      widen(a + j * a_row + p * a_col, a_row, a_col, cols, depth, right);
      for (int64_t i = j; i < n; i += nb) {
        const int64_t rows = least(nb, n - i);
        const double* block = right;
        if (i != j) widen(a + i * a_row + p * a_col, a_row, a_col, rows, depth, left), block = left;
        gemm<double>({rows, cols, depth, 1, block, kc, 1, right, 1, kc, 1, out + i * out_row + j, out_row},
                     scratch);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) out[i * out_row + j] = out[j * out_row + i];
}

template void gram<float>(int64_t, int64_t, const float*, int64_t, int64_t, double*, int64_t, double*);
template void gram<double>(int64_t, int64_t, const double*, int64_t, int64_t, double*, int64_t, double*);

}  // namespace tk::TK_ISA
