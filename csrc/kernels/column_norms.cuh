// Norms of the columns of many matrices in one launch, and whether anything in them is not finite.
//
//   scale[j] = 1 / sqrt(Σ_i d[i,j]²), or 0 where that norm is below 1e-30;  flag |= not finite(d or u)
//
// Layout: d and u by strides (NormProblem). Tiling: 256 threads take 32 columns: lanes along columns, eight
// warps along rows; 2,048 bytes of shared memory. Numerics: squares in float64, summed in a fixed order.
// Template: T = float, double.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

template <class T>
__global__ void __launch_bounds__(norm_threads)
    column_norms(const NormProblem<T>* __restrict__ problems, int count, int tiles) {
  constexpr int warps = norm_threads / 32;
  TK_SHARED(double, part, [warps][norm_columns]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const NormProblem<T>& p = problems[problem_of_tile(problems, count, tile)];
    const int tiles_d = (p.cols + norm_columns - 1) / norm_columns, own = tile - p.first_tile;
    const bool of_u = own >= tiles_d;
    const int j = (of_u ? own - tiles_d : own) * norm_columns + lane;
    const int cols = of_u ? p.u_cols : p.cols;
    const int64_t row = of_u ? p.u_cols : p.d_row, col = of_u ? 1 : p.d_col;
    const T* x = of_u ? p.u : p.d;
    double sum = 0;
    bool bad = false;
    if (j < cols)
      for (int i = warp; i < p.rows; i += warps) {
        const T value = x[i * row + j * col];
        bad |= !isfinite(value);
        sum += double(value) * double(value);
      }
    part[warp][lane] = sum;
    if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(p.flag, 1);
    if (!of_u && warp == 0 && j < cols) {
      double total = 0;
      for (int w = 0; w < warps; ++w) total += part[w][lane];
      const double norm = sqrt(total);
      p.scale[j] = norm < 1e-30 ? T(0) : T(1 / norm);
    }
    __syncthreads();  // part is read until here
  }
}

}  // namespace tk
