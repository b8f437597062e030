// Matrix products of different sizes in one launch: changes of basis, n-mode products by strides.
//
//   out[i,j] = alpha Σ_k a[i,k] b[k,j] + beta source[i,j]
//
// Layout: any strides; k of a and b, and j of b and out, may run over two dimensions (GemmProblem), so that
// an unfolding is multiplied where it lies. out may be source itself; it may not overlap a or b. Tiling: 128
// threads make a 64×64 tile of out, 8×4 each, in steps of 16 over k. Two buffers of (64 + 64)×16 elements in
// shared memory (rows padded by 4): 17,408 bytes in float32, 34,816 in float64; the next step's operands
// travel through registers while this one is multiplied; one barrier a step. The grid is persistent: block b
// takes tiles b, b + gridDim, … Numerics: products and sums in T with fused multiply-add (never TF32), k in
// order, one accumulator per entry: results do not depend on the grid. Squares are summed in float64 in a
// fixed order. Template: T = float, double.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

struct GemmTile {
  static constexpr int m = gemm_tile, n = gemm_tile, k = 16, threads = gemm_threads, pad = 4;
  static constexpr int rows = 8, cols = 4;       // of one thread
  static constexpr int loads = m * k / threads;  // elements of a (and of b) that one thread fetches
  static_assert(rows * cols * threads == m * n && loads * threads == n * k, "the tile must divide evenly");
};

// One thread's share of the next m×k tile of a and k×n tile of b, on its way through registers. Lanes run
// along whichever index is contiguous in memory.
template <class T>
struct GemmFetch {
  using Tile = GemmTile;
  T a[Tile::loads], b[Tile::loads];

  static __device__ __forceinline__ int along(bool k_lanes, int load) {  // index in m or n
    return k_lanes ? threadIdx.x / Tile::k + load * (Tile::threads / Tile::k) : threadIdx.x % Tile::m;
  }
  static __device__ __forceinline__ int deep(bool k_lanes, int load) {  // index in k
    return k_lanes ? threadIdx.x % Tile::k : threadIdx.x / Tile::m + load * (Tile::threads / Tile::m);
  }

  __device__ __forceinline__ void load(const GemmProblem<T>& p, int i0, int j0, int k0) {
    const bool a_k = p.a_col == 1, b_k = p.b_row == 1 && p.b_col != 1;
#pragma unroll
    for (int l = 0; l < Tile::loads; ++l) {
      const int i = i0 + along(a_k, l), k = k0 + deep(a_k, l);
      a[l] = i < p.m && k < p.depth ? p.a[i * p.a_row + strided(k, p.depth_inner, p.a_col, p.a_col_outer)]
                                    : T(0);
    }
#pragma unroll
    for (int l = 0; l < Tile::loads; ++l) {
      const int j = j0 + along(b_k, l), k = k0 + deep(b_k, l);
      b[l] = j < p.n && k < p.depth ? p.b[strided(k, p.depth_inner, p.b_row, p.b_row_outer) +
                                          strided(j, p.n_inner, p.b_col, p.b_col_outer)]
                                    : T(0);
    }
  }

  __device__ __forceinline__ void store(const GemmProblem<T>& p, T (*to_a)[Tile::m + Tile::pad],
                                        T (*to_b)[Tile::n + Tile::pad]) const {
    const bool a_k = p.a_col == 1, b_k = p.b_row == 1 && p.b_col != 1;
#pragma unroll
    for (int l = 0; l < Tile::loads; ++l) {
      to_a[deep(a_k, l)][along(a_k, l)] = a[l];
      to_b[deep(b_k, l)][along(b_k, l)] = b[l];
    }
  }
};

// What the flag asks for instead of the product, over one tile.
template <class T>
__device__ void gemm_on_flag(const GemmProblem<T>& p, int i0, int j0) {
  for (int e = threadIdx.x; e < GemmTile::m * GemmTile::n; e += GemmTile::threads) {
    const int i = i0 + e / GemmTile::n, j = j0 + e % GemmTile::n;
    if (i >= p.m || j >= p.n) continue;
    p.out[i * p.out_row + strided(j, p.n_inner, p.out_col, p.out_col_outer)] =
        p.on_flag == OnFlag::source
            ? p.source[i * p.source_row + strided(j, p.n_inner, p.source_col, p.source_col_outer)]
            : T(nan(""));
  }
}

template <class T>
__global__ void __launch_bounds__(GemmTile::threads)
    grouped_gemm(const GemmProblem<T>* __restrict__ problems, int count, int tiles) {
  using Tile = GemmTile;
  TK_SHARED(T, as, [2][Tile::k][Tile::m + Tile::pad]);
  TK_SHARED(T, bs, [2][Tile::k][Tile::n + Tile::pad]);
  TK_SHARED(GemmProblem<T>, p);
  TK_SHARED(double, part, [Tile::threads / 32]);
  // Threads of a warp: two rows of threads by sixteen columns; a thread's columns are 16 apart, so that a
  // warp writes runs of 16 neighbours.
  const int row = threadIdx.x / 16 * Tile::rows, col = threadIdx.x % 16;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) p = problems[problem_of_tile(problems, count, tile)];
    __syncthreads();
    const int tiles_n = (p.n + Tile::n - 1) / Tile::n, own = tile - p.first_tile;
    const int i0 = own / tiles_n * Tile::m, j0 = own % tiles_n * Tile::n;
    if (p.flag != nullptr && *p.flag != 0) {
      gemm_on_flag(p, i0, j0);
      __syncthreads();  // p is read until here
      continue;
    }
    T sum[Tile::rows][Tile::cols] = {};
    GemmFetch<T> next;
    next.load(p, i0, j0, 0);
    next.store(p, as[0], bs[0]);
    __syncthreads();
    for (int k0 = 0, buffer = 0; k0 < p.depth; k0 += Tile::k, buffer ^= 1) {
      const bool more = k0 + Tile::k < p.depth;
      if (more) next.load(p, i0, j0, k0 + Tile::k);
#pragma unroll
      for (int k = 0; k < Tile::k; ++k) {
        T a[Tile::rows], b[Tile::cols];
#pragma unroll
        for (int i = 0; i < Tile::rows; ++i) a[i] = as[buffer][k][row + i];
#pragma unroll
        for (int j = 0; j < Tile::cols; ++j) b[j] = bs[buffer][k][col + 16 * j];
#pragma unroll
        for (int i = 0; i < Tile::rows; ++i)
#pragma unroll
          for (int j = 0; j < Tile::cols; ++j) sum[i][j] += a[i] * b[j];
      }
      if (more) next.store(p, as[buffer ^ 1], bs[buffer ^ 1]);
      __syncthreads();
    }
    const T alpha = T(p.alpha), beta = T(p.beta);
    double squares = 0;
#pragma unroll
    for (int j = 0; j < Tile::cols; ++j) {
      const int n = j0 + col + 16 * j;
      if (n >= p.n) continue;
      const int64_t at_n = strided(n, p.n_inner, p.out_col, p.out_col_outer);
      const int64_t from_n = strided(n, p.n_inner, p.source_col, p.source_col_outer);
#pragma unroll
      for (int i = 0; i < Tile::rows; ++i) {
        const int m = i0 + row + i;
        if (m >= p.m) continue;
        T value = alpha * sum[i][j];
        if (beta != T(0)) value += beta * p.source[m * p.source_row + from_n];
        if (p.upper && m > n) value = T(0);
        if (p.out != nullptr) p.out[m * p.out_row + at_n] = value;
        squares += double(value) * double(value);
      }
    }
    if (p.squares != nullptr) {
      squares = block_sum(squares, part);
      if (threadIdx.x == 0) p.squares[own] = squares;
    }
    __syncthreads();  // p is read until here
  }
}

}  // namespace tk
