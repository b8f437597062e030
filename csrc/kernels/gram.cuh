// Gram matrices of the rows of many matrices in one launch (batched SYRK), in double precision: the rows may
// be those of any unfolding of a tensor, read where it lies.
//
//   gram[i,j] = Σ_k a[i,k] a[j,k]
//
// Layout: a by strides (GramProblem), k may run over two dimensions. gram and partial are row-major,
// size×size. Tiling: 128 threads make a lower 64×64 tile for one part of the depth, in steps of 16: warp w
// has rows 16w to 16w+15, 32 doubles per thread. Both operands lie in shared memory as doubles, twice
// 2×64×20×8 bytes = 40,960: one step is multiplied while the next is fetched, with one barrier a step. The
// tile is written at (i,j) and (j,i). The grid is persistent. Where the depth is split, every part goes to
// `partial` and gram_reduce adds them. Numerics: tensor-core products in double precision (mma m8n8k4), k in
// order within a part, parts in order; no atomics, so results are the same for every grid. float32 products
// are exact. Template: T = float, double.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"
#include "kernels/warp.cuh"

namespace tk {

struct GramTile {
  static constexpr int size = gram_tile, k = 16, pad = 4;
  static constexpr int rows = size / (gram_threads / 32);  // of one warp
  static constexpr int loads = size * k / gram_threads;    // elements of one operand that one thread fetches
  static_assert(rows % 8 == 0 && loads * gram_threads == size * k, "the tile must divide evenly");
  using Operand = double[size][k + pad];
};

// Row and column of lower tile t, counted by rows.
struct LowerTile {
  int row = 0, column;
  explicit __device__ LowerTile(int t) {
    while ((row + 1) * (row + 2) / 2 <= t) ++row;
    column = t - row * (row + 1) / 2;
  }
};

// One thread's share of a size×k tile of a, on its way through registers. Lanes run along whichever index is
// contiguous in memory.
template <class T>
struct GramFetch {
  T value[GramTile::loads];

  static __device__ __forceinline__ int row(bool k_lanes, int load) {
    return k_lanes ? threadIdx.x / GramTile::k + load * (gram_threads / GramTile::k)
                   : threadIdx.x % GramTile::size;
  }
  static __device__ __forceinline__ int deep(bool k_lanes, int load) {
    return k_lanes ? threadIdx.x % GramTile::k
                   : threadIdx.x / GramTile::size + load * (gram_threads / GramTile::size);
  }

  __device__ __forceinline__ void load(const GramProblem<T>& p, int i0, int k0, int k_end) {
    const bool k_lanes = p.col == 1;
#pragma unroll
    for (int l = 0; l < GramTile::loads; ++l) {
      const int i = i0 + row(k_lanes, l), k = k0 + deep(k_lanes, l);
      value[l] = i < p.size && k < k_end ? p.a[i * p.row + strided(k, p.inner, p.col, p.col_outer)] : T(0);
    }
  }

  __device__ __forceinline__ void store(const GramProblem<T>& p, GramTile::Operand& to) const {
    const bool k_lanes = p.col == 1;
#pragma unroll
    for (int l = 0; l < GramTile::loads; ++l) to[row(k_lanes, l)][deep(k_lanes, l)] = value[l];
  }
};

template <class T>
__global__ void __launch_bounds__(gram_threads)
    gram(const GramProblem<T>* __restrict__ problems, int count, int tiles) {
  using Tile = GramTile;
  TK_SHARED(Tile::Operand, operands, [2][2]);  // buffer, rows or columns
  TK_SHARED(GramProblem<T>, p);
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * Tile::rows;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) p = problems[problem_of_tile(problems, count, tile)];
    __syncthreads();
    if (p.flag == nullptr || *p.flag == 0) {
      const int own = tile - p.first_tile, split = own % p.splits;
      const LowerTile at(own / p.splits);
      const int i0 = at.row * Tile::size, j0 = at.column * Tile::size;
      const int k_begin = split * p.split_depth,
                k_end = p.splits == 1 ? p.depth : min(p.depth, k_begin + p.split_depth);
      const bool diagonal = i0 == j0;
      double sum[Tile::rows / 8][Tile::size / 8][2] = {};
      GramFetch<T> next_rows, next_columns;
      next_rows.load(p, i0, k_begin, k_end);
      if (!diagonal) next_columns.load(p, j0, k_begin, k_end);
      int buffer = 0;
      for (int k0 = k_begin; k0 < k_end; k0 += Tile::k, buffer ^= 1) {
        next_rows.store(p, operands[buffer][0]);
        if (!diagonal) next_columns.store(p, operands[buffer][1]);
        __syncthreads();
        next_rows.load(p, i0, k0 + Tile::k, k_end);
        if (!diagonal) next_columns.load(p, j0, k0 + Tile::k, k_end);
        const Tile::Operand &rows = operands[buffer][0], &columns = operands[buffer][diagonal ? 0 : 1];
#pragma unroll
        for (int k = lane % 4; k < Tile::k; k += 4) {
          double b[Tile::size / 8];
#pragma unroll
          for (int j = 0; j < Tile::size / 8; ++j) b[j] = columns[j * 8 + lane / 4][k];
#pragma unroll
          for (int i = 0; i < Tile::rows / 8; ++i) {
            const double a = rows[first_row + i * 8 + lane / 4][k];
#pragma unroll
            for (int j = 0; j < Tile::size / 8; ++j) mma_8x8x4(sum[i][j], a, b[j]);
          }
        }
      }
      const bool whole = p.splits == 1;
      double* out = whole ? p.gram : p.partial + static_cast<int64_t>(split) * p.size * p.size;
#pragma unroll
      for (int i = 0; i < Tile::rows / 8; ++i)
#pragma unroll
        for (int j = 0; j < Tile::size / 8; ++j)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int row = i0 + first_row + i * 8 + lane / 4, column = j0 + j * 8 + lane % 4 * 2 + v;
            if (row >= p.size || column > row) continue;
            out[row * p.size + column] = sum[i][j][v];
            if (whole) out[column * p.size + row] = sum[i][j][v];
          }
    }
    __syncthreads();  // p and the operands are read until here
  }
}

// gram = Σ_part partial[part], in order, over one lower tile per turn.
template <class T>
__global__ void __launch_bounds__(gram_reduce_threads)
    gram_reduce(const GramProblem<T>* __restrict__ problems, int count, int tiles) {
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const GramProblem<T>& p = problems[problem_of_tile(problems, count, tile, &GramProblem<T>::first_reduce)];
    if (p.splits == 1 || (p.flag != nullptr && *p.flag != 0)) continue;
    const LowerTile at(tile - p.first_reduce);
    for (int e = threadIdx.x; e < gram_tile * gram_tile; e += blockDim.x) {
      const int row = at.row * gram_tile + e / gram_tile, column = at.column * gram_tile + e % gram_tile;
      if (row >= p.size || column > row) continue;
      double sum = 0;
      for (int part = 0; part < p.splits; ++part)
        sum += p.partial[(static_cast<int64_t>(part) * p.size + row) * p.size + column];
      p.gram[row * p.size + column] = sum;
      p.gram[column * p.size + row] = sum;
    }
  }
}

}  // namespace tk
