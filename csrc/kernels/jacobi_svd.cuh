// Left singular vectors of many square matrices in one launch, one block each, by one-sided Jacobi, with the
// rank chosen on the device.
//
//   A ← A J  until its columns are orthogonal;  σ_j = ‖a_j‖,  u_j = a_j / σ_j,
//   rank = min k with Σ_{j≥k} σ_j² <= bound·trace, clamped
//
// Dropping columns of A J loses no more than their norms say, at any stage: the bound holds however few
// sweeps are made. A comes as a sorted Cholesky factor, so that a matrix whose rows are nearly orthogonal
// needs none. Layout: factor column-major; basis row-major. Columns lie in shared memory, beside 2n
// elements and n doubles: all up to n = 239 of 227 KiB in float32, else the first `resident` ones, and the
// others stay in `factor` (1 in 8 for n = 256, 4 in 5 for 512). Tiling: a warp holds two groups of G
// columns in registers and rotates all pairs between them, G independent pairs at a time; lanes run along
// rows for products and along pairs for angles. Round-robin groups, n/G − 1 rounds a sweep with a barrier
// each, so that a sweep moves every column n/G times instead of n. G = 4 up to n = 256, 2 up to 512, then 1
// (float64: 96 and 192). Numerics: T, columns scaled by 1/sqrt(trace) so that squares neither overflow nor
// vanish; squared norms are updated by every rotation and summed anew at each sweep; those that choose the
// rank are summed in double. Template: T = float, double. Any number of threads that is a multiple of 32.
// Limits: one block, hence one multiprocessor, has a matrix up to the largest size, 1,024. Above 239
// (float64: 168) the columns that do not fit come from L2 in every round of every sweep; that is right, and
// tested, but the others of a card stand idle. A cluster of eight blocks would hold the columns in
// distributed shared memory up to some n = 670 of float32 on sm_90; it is not written. A launch per round
// over many blocks needs no cluster, but n/G launches a sweep where a whole truncation takes eleven. Source:
// Hestenes 1958; Drmač & Veselić 2008 (Jacobi on the Cholesky factor). Loops are not unrolled where 128
// registers (512 threads) would spill.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/warp.cuh"

namespace tk {

template <class T>
struct JacobiColumns {
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

  // The columns of two groups of G, R elements of each in a lane. In step s column c meets c^s: within the
  // groups for s < G, between them for the others.
  template <int G, int R>
  struct Tile {
    T x[2 * G][R];
    int low, high;  // groups

    __device__ __forceinline__ int index(int c) const { return (c < G ? low : high - 1) * G + c; }
    // The smaller column of the k-th pair: k with a zero put in where s has its highest bit.
    static __device__ __forceinline__ int first(int k, int s) {
      const int bit = s >= 4 ? 4 : s >= 2 ? 2 : 1;
      return (k & -bit) * 2 + (k & (bit - 1));
    }
  };

  // Makes the G pairs of a step orthogonal; whether that took a rotation. One warp.
  template <int G, int R>
  __device__ __forceinline__ bool rotate(Tile<G, R>& tile, int step, T tolerance) const {
    constexpr int share = 32 / G;  // lanes that find the angle of one pair
    const int lane = threadIdx.x % 32;
    const int column_p = tile.first(lane / share, step);
    const int p = tile.index(column_p), q = tile.index(column_p ^ step);
    constexpr int most_rows = G == 1 ? largest_factorization : 0;  // beyond what lanes hold, in memory
    T dots[G];
#pragma unroll
    for (int k = 0; k < G; ++k) {
      const int c = tile.first(k, step);
      dots[k] = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) dots[k] += tile.x[c][r] * tile.x[c ^ step][r];
    }
    if (32 * R < most_rows) {
#pragma unroll 1
      for (int i = lane + 32 * R; i < rows; i += 32) dots[0] += column(p)[i] * column(q)[i];
    }
    const T dot = warp_sums(dots);
    const T xx = p < n ? squares[p] : T(0), yy = q < n ? squares[q] : T(0);
    const bool turns = fabs(dot) > tolerance * sqrt(xx) * sqrt(yy) && xx > 0 && yy > 0;
    if (!__any_sync(full_warp, turns)) return false;
    T cosine = 1, sine = 0;
    __syncwarp();  // every lane has read the squares
    if (turns) {
      const T zeta = (yy - xx) / (2 * dot);
      const T tangent = (zeta < 0 ? T(-1) : T(1)) / (fabs(zeta) + sqrt(1 + zeta * zeta));
      cosine = 1 / sqrt(1 + tangent * tangent);
      sine = tangent * cosine;
      if (lane % share == 0) {
        squares[p] = xx - tangent * dot;
        squares[q] = yy + tangent * dot;
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < G; ++k) {
      const int c = tile.first(k, step);
      const T cos_k = __shfl_sync(full_warp, cosine, k * share),
              sin_k = __shfl_sync(full_warp, sine, k * share);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const T a = tile.x[c][r], b = tile.x[c ^ step][r];
        tile.x[c][r] = cos_k * a - sin_k * b;
        tile.x[c ^ step][r] = sin_k * a + cos_k * b;
      }
    }
    if (32 * R < most_rows) {
#pragma unroll 1
      for (int i = lane + 32 * R; i < rows; i += 32) {
        const T a = column(p)[i], b = column(q)[i];
        column(p)[i] = cosine * a - sine * b;
        column(q)[i] = sine * a + cosine * b;
      }
    }
    return true;
  }

  // Rotates all pairs between two groups of columns, and with `within` those inside them.
  template <int G, int R>
  __device__ bool meet(int low, int high, bool within, T tolerance) const {
    const int lane = threadIdx.x % 32;
    Tile<G, R> tile;
    tile.low = low, tile.high = high;
#pragma unroll
    for (int c = 0; c < 2 * G; ++c) {
      const int j = tile.index(c);
      const T* from = column(j);
#pragma unroll
      for (int r = 0; r < R; ++r) tile.x[c][r] = j < n && lane + 32 * r < rows ? from[lane + 32 * r] : T(0);
    }
    bool rotated = false;
#pragma unroll
    for (int step = 1; step < 2 * G; ++step)
      if (step >= G || within) rotated |= rotate(tile, step, tolerance);
    if (!rotated) return false;
    // A broadcast, so that addresses are found anew rather than kept in registers meanwhile.
    tile.low = __shfl_sync(full_warp, low, 0), tile.high = __shfl_sync(full_warp, high, 0);
#pragma unroll
    for (int c = 0; c < 2 * G; ++c) {
      const int j = tile.index(c);
      T* to = column(j);
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (j < n && lane + 32 * r < rows) to[lane + 32 * r] = tile.x[c][r];
    }
    return true;
  }

  // All pairs once; whether any was rotated. In round r, group m−1 meets r and r+k meets r−k (mod m−1); a
  // group without a partner is alone in the first round, which also rotates within groups.
  template <int G, int R>
  __device__ bool sweep(T tolerance) const {
    const int groups = (n + G - 1) / G, players = groups + groups % 2, others = players - 1;
    bool rotated = false;
    for (int round = 0; round < others; ++round) {
#pragma unroll 1
      for (int k = threadIdx.x / 32; k < players / 2; k += blockDim.x / 32) {
        const int a = k == 0 ? players - 1 : (round + k) % others;
        const int b = k == 0 ? round : (round + others - k) % others;
        if (max(a, b) < groups || (G > 1 && round == 0))
          rotated |= meet<G, R>(min(a, b), max(a, b), round == 0, tolerance);
      }
      __syncthreads();
    }
    return __syncthreads_or(rotated);
  }

  __device__ bool sweep(T tolerance) const {
    constexpr int held = sizeof(T) == 4 ? 64 : 24;  // elements in the registers of a lane
    if (sizeof(T) == 4 && rows <= 128) return sweep<4, 4>(tolerance);
    if (rows <= 4 * held) return sweep<4, held / 8>(tolerance);
    if (rows <= 8 * held) return sweep<2, held / 4>(tolerance);
    return sweep<1, held / 4>(tolerance);
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
  const JacobiColumns<T> a(memory, p.factor, n, n, p.resident);
  a.load(p.factor, *p.trace > 0 ? T(1 / sqrt(*p.trace)) : T(1));
  for (int s = 0; s < p.sweeps; ++s) {
    a.sum_squares();
    if (!a.sweep(T(p.tolerance))) break;
  }
  const double trace = *p.trace;
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
__global__ void __launch_bounds__(jacobi_svd_threads, 1)
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
