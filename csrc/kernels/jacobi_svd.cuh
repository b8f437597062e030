// Left singular vectors of many square matrices in one launch, one block each, by one-sided Jacobi, with the
// rank chosen on the device.
//
//   A ← A J  until its columns are orthogonal;  σ_j = ‖a_j‖,  u_j = a_j / σ_j,
//   rank = min k with Σ_{j≥k} σ_j² <= bound·trace, clamped
//
// Dropping columns of A J loses no more than their norms say, at any stage: the bound holds however few
// sweeps are made. A comes as a sorted Cholesky factor, so that a matrix whose rows are nearly orthogonal
// needs none. Layout: factor column-major; basis row-major. Columns lie in shared memory (n² + 2n elements
// and n doubles), or stay in `factor` where that is too small. Tiling: a warp per pair of columns, lanes
// along rows, the first 32·cached rows kept in registers between the dot product and the rotation;
// round-robin pairs, n−1 rounds a sweep with a barrier each. Numerics: T, columns scaled by 1/sqrt(trace) so
// that squares neither overflow nor vanish; squared norms are updated by every rotation and summed anew at
// each sweep; those that choose the rank are summed in double. Template: T = float, double. Any number of
// threads that is a multiple of 32. Source: Hestenes 1958; Drmač & Veselić 2008 (Jacobi on the Cholesky
// factor).
// Loops are not unrolled where 64 registers (1024 threads) would spill.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/warp.cuh"

namespace tk {

template <class T>
struct JacobiColumns {
  static constexpr int cached =
      sizeof(T) == 4 ? 8 : 1;  // elements of a column that a lane keeps in registers
  double* energy;              // of column j, relative to the trace
  T* columns;
  T* squares;   // ‖column j‖²
  int* order;   // columns by descending energy
  int n, rows;  // rows of a column

  // `memory` holds everything but the columns, and those too where `elsewhere` is null.
  __device__ JacobiColumns(void* memory, T* elsewhere, int n, int rows) : n(n), rows(rows) {
    energy = static_cast<double*>(memory);
    T* after = reinterpret_cast<T*>(energy + n);
    columns = elsewhere != nullptr ? elsewhere : after;
    squares = elsewhere != nullptr ? after : after + n * rows;
    order = reinterpret_cast<int*>(squares + n);
  }

  __device__ void load(const T* factor, T scale) const {
    for (int e = threadIdx.x; e < n * rows; e += blockDim.x) columns[e] = factor[e] * scale;
    __syncthreads();
  }

  __device__ void sum_squares() const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
      T sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32) sum += columns[j * rows + i] * columns[j * rows + i];
      sum = warp_sum(sum);
      if (lane == 0) squares[j] = sum;
    }
    __syncthreads();
  }

  // Makes columns p and q orthogonal; whether that took a rotation. One warp.
  __device__ bool rotate(int p, int q, T tolerance) const {
    const int lane = threadIdx.x % 32;
    T *x = columns + p * rows, *y = columns + q * rows;
    T own_x[cached], own_y[cached], dot = 0;
#pragma unroll
    for (int c = 0; c < cached; ++c) {
      const int i = lane + 32 * c;
      own_x[c] = i < rows ? x[i] : T(0);
      own_y[c] = i < rows ? y[i] : T(0);
      dot += own_x[c] * own_y[c];
    }
#pragma unroll 1
    for (int i = lane + 32 * cached; i < rows; i += 32) dot += x[i] * y[i];
    dot = warp_sum(dot);
    const T xx = squares[p], yy = squares[q];
    if (!(fabs(dot) > tolerance * sqrt(xx) * sqrt(yy)) || !(xx > 0) || !(yy > 0)) return false;
    const T zeta = (yy - xx) / (2 * dot);
    const T tangent = (zeta < 0 ? T(-1) : T(1)) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    const T cosine = 1 / sqrt(1 + tangent * tangent), sine = tangent * cosine;
#pragma unroll
    for (int c = 0; c < cached; ++c) {
      const int i = lane + 32 * c;
      if (i >= rows) continue;
      x[i] = cosine * own_x[c] - sine * own_y[c];
      y[i] = sine * own_x[c] + cosine * own_y[c];
    }
#pragma unroll 1
    for (int i = lane + 32 * cached; i < rows; i += 32) {
      const T a = x[i], b = y[i];
      x[i] = cosine * a - sine * b;
      y[i] = sine * a + cosine * b;
    }
    __syncwarp();  // every lane has read the squares
    if (lane == 0) {
      squares[p] = xx - tangent * dot;
      squares[q] = yy + tangent * dot;
    }
    return true;
  }

  // All pairs once; whether any was rotated. In round r, player m−1 meets r and r+k meets r−k (mod m−1).
  __device__ bool sweep(T tolerance) const {
    const int players = n + n % 2, others = players - 1;
    bool rotated = false;
    for (int round = 0; round < others; ++round) {
#pragma unroll 1
      for (int k = threadIdx.x / 32; k < players / 2; k += blockDim.x / 32) {
        const int a = k == 0 ? players - 1 : (round + k) % others;
        const int b = k == 0 ? round : (round + others - k) % others;
        if (max(a, b) < n) rotated |= rotate(min(a, b), max(a, b), tolerance);
      }
      __syncthreads();
    }
    return __syncthreads_or(rotated);
  }

  // Energies and the order of the columns. `shift` is what the factor's squares have too much.
  __device__ void sort(double shift, bool zero) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
      double sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32)
        sum += double(columns[j * rows + i]) * double(columns[j * rows + i]);
      sum = warp_sum(sum);
      if (lane == 0) {
        squares[j] = T(sum);
        energy[j] = zero ? 0 : max(sum - shift, 0.0);
      }
    }
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      int place = 0;
      for (int l = 0; l < n; ++l) place += squares[l] > squares[j] || (squares[l] == squares[j] && l < j);
      order[place] = j;
    }
    __syncthreads();
  }

  __device__ int rank(double bound, int least, int most) const {
    int wanted = n;
    for (double tail = 0; wanted > 0 && bound >= 0; --wanted) {
      tail += energy[order[wanted - 1]];
      if (tail > bound) break;
    }
    return max(min(min(wanted, most), n), min(least, n));
  }
};

template <class T>
__device__ void jacobi_svd_in(const JacobiProblem<T>& p, void* memory, T* elsewhere) {
  TK_SHARED(int, rank);
  const int n = p.size;
  const double trace = *p.trace;
  const JacobiColumns<T> a(memory, elsewhere, n, n);
  a.load(p.factor, trace > 0 ? T(1 / sqrt(trace)) : T(1));
  for (int s = 0; s < p.sweeps; ++s) {
    a.sum_squares();
    if (!a.sweep(T(p.tolerance))) break;
  }
  a.sort(p.shift, !(trace > 0));
  if (threadIdx.x == 0) {
    rank = p.bound < 0 ? min(p.max_rank, n) : a.rank(p.bound, p.min_rank, p.max_rank);
    if (p.rank != nullptr) *p.rank = rank;
  }
  __syncthreads();
  if (p.sigma != nullptr)
    for (int j = threadIdx.x; j < n; j += blockDim.x) p.sigma[j] = T(sqrt(a.energy[a.order[j]] * trace));
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e - i * n, column = a.order[j];
    const bool live = j < rank && a.squares[column] > 0;
    p.basis[e] = live ? a.columns[column * n + i] / sqrt(a.squares[column]) : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(jacobi_svd_threads)
    jacobi_svd(const JacobiProblem<T>* __restrict__ problems) {
  TK_DYN_SMEM(double, memory);
  const JacobiProblem<T>& p = problems[blockIdx.x];
  if (p.flag != nullptr && *p.flag != 0) {
    for (int e = threadIdx.x; e < p.size * p.size; e += blockDim.x)
      p.basis[e] = e / p.size == e % p.size ? T(1) : T(0);
    if (p.sigma != nullptr)
      for (int j = threadIdx.x; j < p.size; j += blockDim.x) p.sigma[j] = T(NAN);
    if (p.rank != nullptr && threadIdx.x == 0) *p.rank = p.size;
    return;
  }
  if (p.work != nullptr)
    jacobi_svd_in(p, p.work, p.factor);
  else
    jacobi_svd_in(p, memory, static_cast<T*>(nullptr));
}

}  // namespace tk
