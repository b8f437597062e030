// Gram matrices of the rows of many matrices in one launch (batched SYRK), in double precision: the rows may
// be those of any unfolding of a tensor, read where it lies.
//
//   gram[i,j] = Σ_k a[i,k] a[j,k]
//
// Layout: a by strides (GramProblem), k may run over two dimensions. gram and partial are row-major,
// size×size. Tiling: 128 threads make a lower 64×64 tile for one part of the depth (double_tile.cuh), in
// steps of 16: both operands twice in shared memory, 40,960 bytes; one step is multiplied while the next is
// fetched, with one barrier a step. The tile is written at (i,j) and (j,i). The grid is persistent. Where the
// depth is split, every part goes to `partial`, and whichever block finishes a tile last adds its parts.
// Numerics: k in order within a part, parts in order, whoever adds them: results are the same for every grid
// and every run. float32 products are exact. Template: T = float, double.
#pragma once

#include "kernels/double_tile.cuh"
#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

// Row and column of lower tile t, counted by rows.
struct LowerTile {
  int row = 0, column;
  explicit __device__ LowerTile(int t) {
    while ((row + 1) * (row + 2) / 2 <= t) ++row;
    column = t - row * (row + 1) / 2;
  }
};

// gram = Σ_part partial[part], in order, over one lower tile.
template <class T>
__device__ __forceinline__ void add_parts(const GramProblem<T>& p, int i0, int j0) {
  const volatile double* partial = p.partial;  // not from this multiprocessor's cache
  for (int e = threadIdx.x; e < DoubleTile::size * DoubleTile::size; e += DoubleTile::threads) {
    const int64_t row = i0 + e / DoubleTile::size, column = j0 + e % DoubleTile::size;
    if (row >= p.size || column > row) continue;
    double sum = 0;
    for (int part = 0; part < p.splits; ++part)
      sum += partial[(part * int64_t{p.size} + row) * p.size + column];
    p.gram[row * p.size + column] = sum;
    p.gram[column * p.size + row] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(gram_threads)
    gram(const GramProblem<T>* __restrict__ problems, int count, int tiles) {
  using Tile = DoubleTile;
  TK_SHARED(Tile::Operand, operands, [2][2]);  // buffer, rows or columns
  TK_SHARED(GramProblem<T>, p);
  TK_SHARED(int, last);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) p = problems[problem_of_tile(problems, count, tile)];
    __syncthreads();
    const int own = tile - p.first_tile, split = own % p.splits, lower = own / p.splits;
    const LowerTile at(lower);
    const int i0 = at.row * Tile::size, j0 = at.column * Tile::size;
    const bool whole = p.splits == 1, diagonal = i0 == j0, k_lanes = p.col == 1;
    const int k_begin = split * p.split_depth,
              k_end = whole ? p.depth : min(p.depth, k_begin + p.split_depth);
    const auto place = [&](int i, int k) { return i * p.row + strided(k, p.inner, p.col, p.col_outer); };
    DoubleSums sums;
    DoubleFetch<T> next_rows, next_columns;
    next_rows.load(p.a, k_lanes, i0, p.size, k_begin, k_end, place);
    if (!diagonal) next_columns.load(p.a, k_lanes, j0, p.size, k_begin, k_end, place);
    int buffer = 0;
    for (int k0 = k_begin; k0 < k_end; k0 += Tile::k, buffer ^= 1) {
      next_rows.store(k_lanes, operands[buffer][0]);
      if (!diagonal) next_columns.store(k_lanes, operands[buffer][1]);
      __syncthreads();
      next_rows.load(p.a, k_lanes, i0, p.size, k0 + Tile::k, k_end, place);
      if (!diagonal) next_columns.load(p.a, k_lanes, j0, p.size, k0 + Tile::k, k_end, place);
      sums.multiply(operands[buffer][0], operands[buffer][diagonal ? 0 : 1]);
    }
    double* out = whole ? p.gram : p.partial + static_cast<int64_t>(split) * p.size * p.size;
    sums.each([&](int i, int j, double value) {
      const int64_t row = i0 + i, column = j0 + j;  // size² may exceed 32 bits
      if (row >= p.size || column > row) return;
      out[row * p.size + column] = value;
      if (whole) out[column * p.size + row] = value;
    });
    if (!whole) {
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();  // the part is everywhere before it is counted
        last = atomicAdd(p.finished + lower, 1) == p.splits - 1;
        __threadfence();
      }
      __syncthreads();
      if (last) add_parts(p, i0, j0);
    }
    __syncthreads();  // p, last and the operands are read until here
  }
}

}  // namespace tk
