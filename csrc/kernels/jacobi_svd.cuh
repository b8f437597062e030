// Left singular vectors of many square matrices in one launch, one block each, by one-sided Jacobi, with the
// rank chosen on the device.
//
//   A ← A J  until its columns are orthogonal;  σ_j = ‖a_j‖,  u_j = a_j / σ_j,
//   rank = min k with Σ_{j≥k} σ_j² <= bound·trace, clamped
//
// Dropping columns of A J loses no more than their norms say, at any stage: the bound holds however few
// sweeps are made. A comes as a sorted Cholesky factor, so that a matrix whose rows are nearly orthogonal
// needs none. Layout: factor column-major; basis row-major. Columns lie in shared memory, beside 2n
// elements and n doubles: all up to n = 237 in 227 KiB of float32, else the first `resident` ones, and the
// others stay in `factor` (9 in 100 for n = 256, 4 in 5 for 512). Tiling: a warp per pair of columns, lanes
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
  // Elements of a column that a lane keeps in registers; what does not spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int cached = sizeof(T) == 4 ? 6 : 1;
#else
  static constexpr int cached = sizeof(T) == 4 ? 8 : 1;
#endif
  double* energy;         // of column j, relative to the trace
  T* squares;             // ‖column j‖²
  int* order;             // columns by descending energy
  T *near, *far;          // columns below `resident` are in shared memory, the others in device memory
  int n, rows, resident;  // rows of a column

  // `memory` holds what jacobi_svd_shared says.
  __device__ JacobiColumns(void* memory, T* far, int n, int rows, int resident)
      : energy(static_cast<double*>(memory)),
        squares(reinterpret_cast<T*>(energy + n)),
        order(reinterpret_cast<int*>(squares + n)),
        near(squares + 2 * n),
        far(far),
        n(n),
        rows(rows),
        resident(resident) {}
  __device__ __forceinline__ T* column(int j) const { return (j < resident ? near : far) + j * rows; }

  __device__ void load(const T* factor, T scale) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < n * rows; e += blockDim.x)
      (e < resident * rows ? near : far)[e] = factor[e] * scale;
    __syncthreads();
  }

  __device__ void sum_squares() const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
      const T* x = column(j);
      T sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32) sum += x[i] * x[i];
      sum = warp_sum(sum);
      if (lane == 0) squares[j] = sum;
    }
    __syncthreads();
  }

  // Makes columns p and q orthogonal; whether that took a rotation. One warp.
  __device__ bool rotate(int p, int q, T tolerance) const {
    const int lane = threadIdx.x % 32;
    T *x = column(p), *y = column(q);
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
      const T* x = column(j);
      double sum = 0;
#pragma unroll 1
      for (int i = lane; i < rows; i += 32) sum += double(x[i]) * double(x[i]);
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
__device__ void jacobi_svd_in(const JacobiProblem<T>& p, void* memory) {
  TK_SHARED(int, rank);
  const int n = p.size;
  const double trace = *p.trace;
  const JacobiColumns<T> a(memory, p.factor, n, n, p.resident);
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
#pragma unroll 1
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e - i * n, column = a.order[j];
    const bool live = j < rank && a.squares[column] > 0;
    p.basis[e] = live ? a.column(column)[i] / sqrt(a.squares[column]) : T(0);
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
  jacobi_svd_in(p, memory);
}

}  // namespace tk
