// A 64×64 tile of a product in double precision on the tensor cores, shared by the kernels that need one.
//
//   sum[i,j] += Σ_k rows[i,k] columns[j,k]
//
// 128 threads; warp w has rows 16w to 16w+15, 32 sums per thread. Operands lie in shared memory as doubles,
// 64×(16+4)×8 = 10,240 bytes each. Numerics: mma m8n8k4, k in order; float32 products are exact.
#pragma once

#include "kernels/limits.h"
#include "kernels/warp.cuh"

namespace tk {

struct DoubleTile {
  static constexpr int size = gram_tile, k = 16, pad = 4, threads = gram_threads;
  static constexpr int rows = size / (threads / 32);  // of one warp
  static constexpr int loads = size * k / threads;    // elements of one operand that one thread fetches
  static_assert(rows % 8 == 0 && loads * threads == size * k, "the tile must divide evenly");
  using Operand = double[size][k + pad];
};

// One thread's share of an operand on its way through registers. Lanes run along whichever index is
// contiguous in memory.
template <class T>
struct DoubleFetch {
  T value[DoubleTile::loads];

  static __device__ __forceinline__ int row(bool k_lanes, int load) {
    return k_lanes ? threadIdx.x / DoubleTile::k + load * (DoubleTile::threads / DoubleTile::k)
                   : threadIdx.x % DoubleTile::size;
  }
  static __device__ __forceinline__ int deep(bool k_lanes, int load) {
    return k_lanes ? threadIdx.x % DoubleTile::k
                   : threadIdx.x / DoubleTile::size + load * (DoubleTile::threads / DoubleTile::size);
  }

  // `at(i, k)` is the element's offset; what lies beyond `size` or `k_end` is zero.
  template <class At>
  __device__ __forceinline__ void load(const T* from, bool k_lanes, int i0, int size, int k0, int k_end,
                                       At&& at) {
#pragma unroll
    for (int l = 0; l < DoubleTile::loads; ++l) {
      const int i = i0 + row(k_lanes, l), k = k0 + deep(k_lanes, l);
      value[l] = i < size && k < k_end ? from[at(i, k)] : T(0);
    }
  }

  __device__ __forceinline__ void store(bool k_lanes, DoubleTile::Operand& to) const {
#pragma unroll
    for (int l = 0; l < DoubleTile::loads; ++l) to[row(k_lanes, l)][deep(k_lanes, l)] = value[l];
  }
};

struct DoubleSums {
  double sum[DoubleTile::rows / 8][DoubleTile::size / 8][2] = {};

  __device__ __forceinline__ void multiply(const DoubleTile::Operand& rows,
                                           const DoubleTile::Operand& columns) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * DoubleTile::rows;
#pragma unroll
    for (int k = lane % 4; k < DoubleTile::k; k += 4) {
      double b[DoubleTile::size / 8];
#pragma unroll
      for (int j = 0; j < DoubleTile::size / 8; ++j) b[j] = columns[j * 8 + lane / 4][k];
#pragma unroll
      for (int i = 0; i < DoubleTile::rows / 8; ++i) {
        const double a = rows[first_row + i * 8 + lane / 4][k];
#pragma unroll
        for (int j = 0; j < DoubleTile::size / 8; ++j) mma_8x8x4(sum[i][j], a, b[j]);
      }
    }
  }

  // f(row, column, value) for what this thread holds, counted from the corner of the tile.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * DoubleTile::rows;
#pragma unroll
    for (int i = 0; i < DoubleTile::rows / 8; ++i)
#pragma unroll
      for (int j = 0; j < DoubleTile::size / 8; ++j)
#pragma unroll
        for (int v = 0; v < 2; ++v) f(first_row + i * 8 + lane / 4, j * 8 + lane % 4 * 2 + v, sum[i][j][v]);
  }
};

}  // namespace tk
