// A small kernel that uses what the executor checks, right or with one planted mistake, so that a test can
// show that the mistake is seen.
//
//   mirrored[b,i] = x[b, n-1-i],   sum[b] = Σ_i x[b,i]      one block of n = blockDim.x threads per row b
#pragma once

#include "core/portability.h"

namespace tk {

enum class Mistake {
  none,
  missing_barrier,     // reads what another thread may not have written yet
  off_by_one,          // reads one element beyond the end of dynamic shared memory
  overrun,             // writes one element beyond it
  wrong_mask,          // a shuffle whose mask leaves out a lane that calls it
  source_outside,      // a shuffle that reads a lane its mask leaves out
  divergent_barrier,   // half of the block at one barrier, half at another
  early_exit,          // one thread leaves before a barrier
  shuffle_as_barrier,  // trusts a shuffle to order shared memory, which only __syncwarp does
  racing_blocks,       // every block writes the same element of global memory
};

template <Mistake mistake>
__global__ void mirror_and_sum(const float* x, float* mirrored, float* sum) {
  TK_DYN_SMEM(float, row);
  TK_SHARED(float, parts, [32]);
  const int n = blockDim.x, i = threadIdx.x, lane = i % 32;
  const int64_t start = int64_t(blockIdx.x) * n;
  row[i + (mistake == Mistake::overrun && i == n - 1)] = x[start + i];
  if (mistake == Mistake::early_exit && i == n - 1) return;
  if (mistake == Mistake::divergent_barrier && i < 32) {
    __syncthreads();
  } else if (mistake != Mistake::missing_barrier) {
    __syncthreads();
  }
  mirrored[start + i] = row[n - 1 - i + (mistake == Mistake::off_by_one)];

  float value = x[start + i];
  const unsigned mask = mistake == Mistake::wrong_mask ? 0x7fffffffu : 0xffffffffu;
  if (mistake == Mistake::source_outside) {
    if (lane < 16) value += __shfl_sync(0xffffu, value, lane + 16);
  } else {
    for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(mask, value, bit);
  }
  if (lane == 0) parts[i / 32] = value;
  if (mistake == Mistake::shuffle_as_barrier) {
    row[i] = value;
    __shfl_sync(0xffffffffu, value, 0);
    value = row[i ^ 1];
  }
  __syncthreads();
  if (i == 0) {
    float total = 0;
    for (int w = 0; w < n / 32; ++w) total += parts[w];
    sum[mistake == Mistake::racing_blocks ? 0 : blockIdx.x] = total;
  }
}

}  // namespace tk
