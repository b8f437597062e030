// n-mode product on the host:  y[o,r,i] = Σ_k M[r,k] x[o,k,i].
//
// inner > 1: for every o a product M (rows×n) times x_o (n×inner). inner = 1: one product x (outer×n) times
// Mᵀ. Threads split the outer index, or the columns when there are too few of them.
#include "core/dispatch.h"
#include "core/scratch.h"
#include "cpu/isa.h"
#include "tucker_kernels.h"

namespace tk {
namespace {

template <class T>
tk_status mode_dot(const T* x, int64_t outer, int64_t n, int64_t inner, const T* matrix, int64_t rows,
                   bool transpose, T* y, int threads) {
  const int64_t row = transpose ? 1 : n, col = transpose ? rows : 1;
  const SimdTable<T>& simd_table = simd<T>();
  const bool by_outer = inner > 1;
  const int64_t length = by_outer ? inner : outer;  // the index that one product streams over
  const int64_t repeats = by_outer ? outer : 1;
  const int64_t parts = repeats >= threads ? 1 : threads;
  const int64_t chunk = (length + parts - 1) / parts;
  const bool serial = threads == 1 || outer * n * inner * rows < 32768;
  bool failed = false;
#pragma omp parallel num_threads(serial ? 1 : threads)
  {
    Scratch<T> scratch(gemm_scratch);
    if (!scratch) {
#pragma omp atomic write
      failed = true;
    } else {
#pragma omp for collapse(2) schedule(static)
      for (int64_t o = 0; o < repeats; ++o)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = part * chunk, size = (length - begin < chunk ? length - begin : chunk);
          if (size <= 0) continue;
          if (by_outer)
            simd_table.gemm({rows, size, n, T(1), matrix, row, col, x + o * n * inner + begin, inner, 1, T(0),
                             y + o * rows * inner + begin, inner},
                            scratch.data());
          else
            simd_table.gemm(
                {size, rows, n, T(1), x + begin * n, n, 1, matrix, col, row, T(0), y + begin * rows, rows},
                scratch.data());
        }
    }
  }
  return failed ? TK_OUT_OF_MEMORY : TK_OK;
}

}  // namespace
}  // namespace tk

tk_status tk_mode_dot_cpu(tk_dtype dtype, const void* x, int64_t outer, int64_t n, int64_t inner,
                          const void* matrix, int64_t rows, int transpose, void* y, int threads) {
  if (outer < 0 || n < 0 || inner < 0 || rows < 0 || threads < 1) return TK_INVALID_ARGUMENT;
  if (outer == 0 || inner == 0 || rows == 0) return TK_OK;
  return tk::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return tk::mode_dot(static_cast<const T*>(x), outer, n, inner, static_cast<const T*>(matrix), rows,
                        transpose != 0, static_cast<T*>(y), threads);
  });
}
