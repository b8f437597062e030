// What kernels share inside a warp: ordered sums, and the double-precision tensor-core product.
#pragma once

#include "core/portability.h"

namespace tk {

constexpr unsigned full_warp = 0xffffffffu;

// The same sum in every lane, in a fixed order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(full_warp, value, bit);
  return value;
}

// Sums of N values over the warp: lane l gets that of value l / (32 / N). N is a power of two, and `value` is
// destroyed.
template <class T, int N>
__device__ __forceinline__ T warp_sums(T (&value)[N]) {
  int bit = 16;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const T kept = upper ? value[k + half] : value[k], sent = upper ? value[k] : value[k + half];
      value[k] = kept + __shfl_xor_sync(full_warp, sent, bit);
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) value[0] += __shfl_xor_sync(full_warp, value[0], bit);
  return value[0];
}

// c += a b for an 8×4 by 4×8 product spread over a warp (PTX mma.m8n8k4 with f64): lane l holds
// a[l/4][l%4], b[l%4][l/4] and c[l/4][2(l%4) + {0, 1}].
__device__ __forceinline__ void mma_8x8x4(double (&c)[2], double a, double b) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
#else
  TK_EMU_MMA_F64(c, a, b);
#endif
}

}  // namespace tk
