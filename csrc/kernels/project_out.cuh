// Takes the span of one matrix out of many others, in one launch and with no intermediate in device memory.
//
//   w_j = d_j / ‖d_j‖ (0 where ‖d_j‖ < 1e-30; or d_j itself);  `passes` times: w ← w − U (Uᵀ w)
//   flag |= not finite(d or U)
//
// Layout: d and out by ProjectionProblem, U n×r row-major. Tiling: columns of w do not meet, so a block takes
// a strip of 16 of them through everything, and only U is streamed, 128 columns at a time. 256 threads; the
// strip (n×16) and 128×16 inner products lie in shared memory, (n + 128)·16·sizeof(T) bytes: 40,960 for
// n = 512 in float32; a strip that is too long stays in `work`. Uᵀw: every lane has 4 columns of U and 64
// sums, warps take every eighth row, and add their sums in order. U(Uᵀw): the same lanes keep the inner
// products in registers, and a row's 16 sums are added over the warp. Numerics: T with fused multiply-add
// (never TF32), norms in double, everything in a fixed order: results do not depend on the grid or on other
// problems. Template: T = float, double.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"
#include "kernels/warp.cuh"

namespace tk {

template <class T>
struct ProjectionStrip {
  static constexpr int columns = projection_columns, threads = projection_threads, warps = threads / 32;
  static constexpr int own = projection_chunk / 32;  // columns of U of one lane
  struct alignas(16) Row {
    T of[columns];
  };

  const T* u;
  int n, r;
  T* inner;   // [columns][projection_chunk]
  Row* rows;  // of the strip

  // This lane's part of row i of U, from column k0 on; zero beyond r.
  __device__ __forceinline__ void load_u(T (&value)[own], int i, int k0) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < own; ++c) {
      const int k = k0 + lane + 32 * c;
      value[c] = k < r ? u[static_cast<int64_t>(i) * r + k] : T(0);
    }
  }

  // inner = Uᵀ w for the columns of U from k0 on; whether this thread saw something that is not finite.
  __device__ bool multiply_by_transpose(int k0) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T sum[own][columns] = {};
    bool bad = false;
#pragma unroll 1
    for (int i = warp; i < n; i += warps) {
      T value[own];
      load_u(value, i, k0);
      const Row row = rows[i];
#pragma unroll
      for (int c = 0; c < own; ++c) {
        if (k0 + 32 * c < r)  // the same for the whole warp
#pragma unroll
          for (int j = 0; j < columns; ++j) sum[c][j] += value[c] * row.of[j];
        bad |= !isfinite(value[c]);
      }
    }
#pragma unroll 1
    for (int turn = 0; turn < warps; ++turn) {
      if (warp == turn)
#pragma unroll
        for (int c = 0; c < own; ++c)
#pragma unroll
          for (int j = 0; j < columns; ++j) {
            T& to = inner[j * projection_chunk + lane + 32 * c];
            to = turn == 0 ? sum[c][j] : to + sum[c][j];
          }
      __syncthreads();
    }
    return bad;
  }

  // Sums over lanes, every lane keeping half of the columns that it has: in the end sum[0] is the sum of
  // column lane / 2 over the lanes of the same parity.
  template <int half>
  static __device__ __forceinline__ void add_halves(T (&sum)[columns]) {
    const bool upper = threadIdx.x & (2 * half);
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const T keep = upper ? sum[j + half] : sum[j], give = upper ? sum[j] : sum[j + half];
      sum[j] = keep + __shfl_xor_sync(full_warp, give, 2 * half);
    }
    if constexpr (half > 1) add_halves<half / 2>(sum);
  }

  // w −= U inner.
  __device__ void subtract(int k0) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T t[own][columns];
#pragma unroll
    for (int c = 0; c < own; ++c)
#pragma unroll
      for (int j = 0; j < columns; ++j) t[c][j] = inner[j * projection_chunk + lane + 32 * c];
#pragma unroll 1
    for (int i = warp; i < n; i += warps) {
      T value[own], sum[columns] = {};
      load_u(value, i, k0);
#pragma unroll
      for (int c = 0; c < own; ++c) {
        if (k0 + 32 * c < r)
#pragma unroll
          for (int j = 0; j < columns; ++j) sum[j] += value[c] * t[c][j];
      }
      add_halves<columns / 2>(sum);
      sum[0] += __shfl_xor_sync(full_warp, sum[0], 1);
      if (lane % 2 == 0) rows[i].of[lane / 2] -= sum[0];
    }
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(projection_threads)
    project_out(const ProjectionProblem<T>* __restrict__ problems, int count, int tiles) {
  using Strip = ProjectionStrip<T>;
  constexpr int columns = Strip::columns, groups = projection_threads / columns;
  static_assert(columns == 16, "the sums over lanes are made for 16 columns");
  TK_DYN_SMEM(double, memory);
  TK_SHARED(double, squares, [groups][columns]);
  TK_SHARED(ProjectionProblem<T>, p);
  const int own_column = threadIdx.x % columns, group = threadIdx.x / columns;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) p = problems[problem_of_tile(problems, count, tile)];
    __syncthreads();
    const int strip_index = tile - p.first_tile, j = strip_index * columns + own_column;
    T* inner = reinterpret_cast<T*>(memory);
    T* strip_memory = p.work != nullptr ? p.work + static_cast<int64_t>(strip_index) * p.n * columns
                                        : inner + columns * projection_chunk;
    const Strip strip{p.u, p.n, p.r, inner, reinterpret_cast<typename Strip::Row*>(strip_memory)};
    bool bad = false;
    double sum = 0;
    for (int i = group; i < p.n; i += groups) {
      const T value = j < p.cols ? p.d[i * p.d_row + j * p.d_col] : T(0);
      bad |= !isfinite(value);
      sum += double(value) * double(value);
      strip.rows[i].of[own_column] = value;
    }
    if (p.normalise) {
      squares[group][own_column] = sum;
      __syncthreads();
      double total = 0;
      for (int g = 0; g < groups; ++g) total += squares[g][own_column];
      const double norm = sqrt(total);
      const T scale = norm < 1e-30 ? T(0) : T(1 / norm);
      for (int i = group; i < p.n; i += groups) strip.rows[i].of[own_column] *= scale;
    }
    __syncthreads();
    for (int pass = 0; pass < p.passes; ++pass)
      for (int k0 = 0; k0 < p.r; k0 += projection_chunk) {
        bad |= strip.multiply_by_transpose(k0);
        strip.subtract(k0);
      }
    if (__syncthreads_or(bad) && threadIdx.x == 0 && p.flag != nullptr) atomicOr(p.flag, 1);
    if (j < p.cols)
      for (int i = group; i < p.n; i += groups)
        p.out[static_cast<int64_t>(i) * p.cols + j] = strip.rows[i].of[own_column];
    __syncthreads();  // p and the strip are read until here
  }
}

}  // namespace tk
