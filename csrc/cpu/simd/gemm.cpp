// General matrix product, C = alpha A B + beta C, one thread.
//
// Blocking: panels of B (kc × nc) and of A (mc × kc) are copied into `scratch` in the order the micro-kernel
// reads them, so strides cost nothing inside. The micro-kernel keeps an MR × 2·W block of C in registers (W
// lanes per vector): 24 accumulators with 32 registers, 12 with 16. Numerics: products and sums in T with
// fused multiply-add; the sum over k runs in order within blocks of kc.
#include "cpu/simd/gemm.h"

namespace tk::TK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, MR = 12;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, MR = 6;
#else
constexpr int vector_bytes = 16, MR = 4;
#endif

template <class T>
struct Tile {
  static constexpr int W = vector_bytes / sizeof(T), NR = 2 * W;
  typedef T Vec __attribute__((vector_size(vector_bytes)));
  typedef T Unaligned __attribute__((vector_size(vector_bytes), aligned(alignof(T))));

  static void multiply(int64_t k, const T* a, const T* b, T (&out)[MR * NR]) {
    Vec acc[MR][2] = {};
    for (int64_t p = 0; p < k; ++p, a += MR, b += NR) {
      const Vec b0 = *reinterpret_cast<const Unaligned*>(b), b1 = *reinterpret_cast<const Unaligned*>(b + W);
      for (int i = 0; i < MR; ++i) {
        acc[i][0] += a[i] * b0;
        acc[i][1] += a[i] * b1;
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < 2; ++j) *reinterpret_cast<Unaligned*>(out + i * NR + j * W) = acc[i][j];
  }
};

template <class T>
inline T min_of(T a, T b) {
  return a < b ? a : b;
}

// Copies a rows×k block into slabs of `width` rows, k-major inside a slab, zero-filled at the ragged end.
template <int width, class T>
void pack(const T* src, int64_t row, int64_t col, int64_t rows, int64_t k, T* dst) {
  for (int64_t r = 0; r < rows; r += width) {
    const int64_t live = min_of<int64_t>(width, rows - r);
    for (int64_t p = 0; p < k; ++p, dst += width) {
      const T* s = src + r * row + p * col;
      int64_t i = 0;
      for (; i < live; ++i) dst[i] = s[i * row];
      for (; i < width; ++i) dst[i] = T(0);
    }
  }
}

}  // namespace

template <class T>
void gemm(const GemmArgs<T>& g, T* scratch) {
  constexpr int NR = Tile<T>::NR;
  constexpr int64_t kc = 256, mc = 144, nc = 512;  // 144·256 + 512·256 elements of scratch
  static_assert((mc + nc) * kc <= gemm_scratch, "scratch too small");
  static_assert(mc % MR == 0 && nc % NR == 0, "blocks must hold whole tiles");
  T *packed_b = scratch, *packed_a = scratch + nc * kc;
  if (g.k == 0) {
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j)
        g.c[i * g.c_row + j] = g.beta == T(0) ? T(0) : g.beta * g.c[i * g.c_row + j];
    return;
  }
  for (int64_t j0 = 0; j0 < g.n; j0 += nc) {
    const int64_t n = min_of(nc, g.n - j0);
    for (int64_t p0 = 0; p0 < g.k; p0 += kc) {
      const int64_t k = min_of(kc, g.k - p0);
      const T beta = p0 == 0 ? g.beta : T(1);
      pack<NR>(g.b + p0 * g.b_row + j0 * g.b_col, g.b_col, g.b_row, n, k, packed_b);
      for (int64_t i0 = 0; i0 < g.m; i0 += mc) {
        const int64_t m = min_of(mc, g.m - i0);
        pack<MR>(g.a + i0 * g.a_row + p0 * g.a_col, g.a_row, g.a_col, m, k, packed_a);
        for (int64_t j = 0; j < n; j += NR)
          for (int64_t i = 0; i < m; i += MR) {
            T out[MR * NR];
            Tile<T>::multiply(k, packed_a + i * k, packed_b + j * k, out);
            const int64_t rows = min_of<int64_t>(MR, m - i), cols = min_of<int64_t>(NR, n - j);
            for (int64_t r = 0; r < rows; ++r) {
              T* c = g.c + (i0 + i + r) * g.c_row + j0 + j;
              if (beta == T(0))
                for (int64_t q = 0; q < cols; ++q) c[q] = g.alpha * out[r * NR + q];
              else
                for (int64_t q = 0; q < cols; ++q) c[q] = g.alpha * out[r * NR + q] + beta * c[q];
            }
          }
      }
    }
  }
}

template void gemm<float>(const GemmArgs<float>&, float*);
template void gemm<double>(const GemmArgs<double>&, double*);

}  // namespace tk::TK_ISA
