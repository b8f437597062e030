// How a block finds its work in a table of problems, how a table gets to the device, and small reductions.
#pragma once

#include <cstdint>

#include "core/portability.h"
#include "kernels/limits.h"
#include "kernels/problems.h"

#if defined(__CUDACC__)
#define TK_GRID_CONSTANT __grid_constant__
#else
#define TK_GRID_CONSTANT
#endif

namespace tk {

// The problem that tile t of a persistent grid belongs to: the last with first_tile (or another prefix sum)
// <= t.
template <class Problem>
__device__ __forceinline__ int problem_of_tile(const Problem* problems, int count, int tile,
                                               int32_t Problem::* first = &Problem::first_tile) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (problems[middle].*first <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Where index i lies that may run over two dimensions; see problems.h.
__device__ __forceinline__ int64_t strided(int i, int inner, int64_t stride, int64_t outer_stride) {
  if (inner == 0) return i * stride;
  const int outer = i / inner;
  return outer * outer_stride + (i - outer * inner) * stride;
}

// Sum over a block of whole warps, in a fixed order; every thread gets it. `part` holds one value per warp.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* part) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < warps; ++w) sum += part[w];
  return sum;
}

__global__ void __launch_bounds__(store_threads)
    store_table(const TK_GRID_CONSTANT TablePiece piece, uint32_t* to) {
  const int lane = threadIdx.x % 32, group = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (group >= piece.groups) return;
  const uint32_t present = piece.word[2 * group], values = piece.word[2 * group + 1];
  const uint32_t before = present & ((1u << lane) - 1);
  to[(piece.first_group + group) * 32 + lane] = present >> lane & 1 ? piece.word[values + __popc(before)] : 0;
}

}  // namespace tk
