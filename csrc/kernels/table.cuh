// How a block finds its work in a table of problems, how a table gets to the device, and small reductions.
#pragma once

#include <cstdint>

#include "core/portability.h"

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

// A piece of a table, passed by value: kernel parameters are copied at launch, so nothing on the host has to
// stay alive, no copy waits for the host, and a captured graph replays the same table.
struct alignas(16) TablePiece {
  static constexpr int words = 1984;  // 31,744 bytes; a kernel takes 32,764 bytes of parameters
  struct alignas(16) Word {
    uint32_t lane[4];
  } word[words];
};

__global__ void __launch_bounds__(256)
    store_table(const TK_GRID_CONSTANT TablePiece piece, TablePiece::Word* to, int words) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = piece.word[i];
}

}  // namespace tk
