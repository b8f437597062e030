// Matrices times square factors in double precision, many in one launch.
//
//   out[i,j] = Σ_k a[i,k] b[k,j],   Σ_k a[i,k] b[j,k],   or  3/2 a[i,j] − 1/2 Σ_k a[i,k] b[k,j]
//
// The first two are what triangular solves are after semidefinite_cholesky has inverted its factor. Rounding
// R⁻¹ or the sums to float32 would lose directions that are nearly dependent on others: the entries of R⁻¹
// grow as the remainders shrink, and the large terms cancel. The third is a Newton step towards the nearest
// orthonormal matrix, where b = aᵀa (Björck & Bowie 1971).
//
// Layout: a and out by strides, b contiguous n×n (TriangularProblem). Tiling: 128 threads make a 64×64 tile
// of out (double_tile.cuh), in steps of 16 over k, up to (or, transposed, from) the diagonal where b is upper
// triangular; 40,960 bytes of shared memory. The grid is persistent. Numerics: products and sums in double, k
// in order, one rounding to T at the end. Template: T = float, double.
#pragma once

#include "kernels/double_tile.cuh"
#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

template <class T>
__global__ void __launch_bounds__(gram_threads)
    triangular_product(const TriangularProblem<T>* __restrict__ problems, int count, int tiles) {
  using Tile = DoubleTile;
  TK_SHARED(Tile::Operand, operands, [2][2]);  // buffer, rows of a or columns of b
  TK_SHARED(TriangularProblem<T>, p);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (threadIdx.x == 0) p = problems[problem_of_tile(problems, count, tile)];
    __syncthreads();
    const int tiles_n = (p.n + Tile::size - 1) / Tile::size, own = tile - p.first_tile;
    const int i0 = own / tiles_n * Tile::size, j0 = own % tiles_n * Tile::size;
    const bool flagged = p.flag != nullptr && *p.flag != 0, k_lanes = p.a_col == 1;
    const bool whole = p.packed != 0, transposed = p.transposed != 0;
    const int k_begin = whole || !transposed ? 0 : j0;
    const int k_end = flagged ? 0 : whole || transposed ? p.n : min(p.n, j0 + Tile::size);
    const auto of_a = [&](int i, int k) { return i * p.a_row + k * p.a_col; };
    const auto of_b = [&](int j, int k) {
      return transposed ? static_cast<int64_t>(j) * p.n + k : static_cast<int64_t>(k) * p.n + j;
    };
    DoubleSums sums;
    DoubleFetch<T> next_a;
    DoubleFetch<double> next_b;
    next_a.load(p.a, k_lanes, i0, p.m, k_begin, k_end, of_a);
    next_b.load(p.b, transposed, j0, p.n, k_begin, k_end, of_b);
    int buffer = 0;
    for (int k0 = k_begin; k0 < k_end; k0 += Tile::k, buffer ^= 1) {
      next_a.store(k_lanes, operands[buffer][0]);
      next_b.store(transposed, operands[buffer][1]);
      __syncthreads();
      next_a.load(p.a, k_lanes, i0, p.m, k0 + Tile::k, k_end, of_a);
      next_b.load(p.b, transposed, j0, p.n, k0 + Tile::k, k_end, of_b);
      sums.multiply(operands[buffer][0], operands[buffer][1]);
    }
    if (!flagged || p.on_flag != OnFlag::skip)
      sums.each([&](int i, int j, double value) {
        const int row = i0 + i, column = j0 + j;
        if (row >= p.m || column >= p.n) return;
        if (p.newton) value = 1.5 * p.a[of_a(row, column)] - 0.5 * value;
        if (flagged && p.on_flag == OnFlag::identity) value = row == column;
        if (flagged && p.on_flag == OnFlag::nan) value = nan("");
        p.out[row * p.out_row + column * p.out_col] = T(value);
      });
    __syncthreads();  // p and the operands are read until here
  }
}

}  // namespace tk
