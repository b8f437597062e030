// Cholesky factors of many semidefinite matrices in one launch, one block each, in double precision: a pivot
// that is too small drops its column instead of failing, and the triangular inverse of what is kept comes
// with it.
//
//   G + shift·trace·I = L Lᵀ  with rows and columns in a static order;   R⁻¹ = L⁻ᵀ on the kept columns
//
// Layout: gram row-major, both triangles. L is packed, row i from i(i+1)/2, in shared memory beside 2n
// doubles: all of it up to n = 238 of 227 KiB, else the first `resident` rows, and the others in `work`.
// Tiling: panels of 8 columns, left-looking. (1) every row subtracts its products with the rows of the panel:
// four lanes a row, eight sums each; (2) one warp factors the 8×8 diagonal block in registers, lane r has row
// r; (3) one thread a row solves against it. Three barriers a panel. The inverse overwrites L, panels from
// the last to the first: y = L⁻¹ L by the same four lanes a row, then y times the inverted diagonal block,
// rows from the last up in chunks, so that nothing is overwritten that is still read. Numerics: double
// precision throughout, sums in a fixed order. In a static order the energy of what is dropped is at most
// n·tolerance. NaN never reaches a pivot test: the trace is checked first. Template: T = float, double (the
// type of the factor; the inverse stays double). Any number of threads that is a multiple of 32.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"
#include "kernels/warp.cuh"

namespace tk {

// The packed lower triangle and what goes with it.
struct PackedCholesky {
  static constexpr int panel = 8, lanes = 4;  // columns of a panel, lanes of a row
  double *near, *far;     // rows below `resident` are in shared memory, the others in device memory
  double* inverse_pivot;  // 1 / L[j,j], 0 where column j was dropped, −1 where it was deferred
  int* order;             // row of gram that row i stands for
  int* source;            // column of L that column i of the output stands for; n: none
  int n, resident;

  __device__ PackedCholesky(double* memory, double* far, int n, int resident)
      : near(memory + 2 * n),
        far(far),
        inverse_pivot(memory),
        order(reinterpret_cast<int*>(inverse_pivot + n)),
        source(order + n),
        n(n),
        resident(resident) {}
  __device__ __forceinline__ double* row(int i) const {
    return (i < resident ? near : far) + i * (i + 1) / 2;
  }
  __device__ __forceinline__ double& at(int i, int j) const { return row(i)[j]; }
  __device__ __forceinline__ bool kept(int j) const { return inverse_pivot[j] != 0; }

  // Descending diagonal, equal ones by index; or as they come.
  __device__ void find_order(const double* gram, bool sort) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      int place = i;
      if (sort) {
        const double own = gram[static_cast<int64_t>(i) * n + i];
        place = 0;
        for (int j = 0; j < n; ++j) {
          const double other = gram[static_cast<int64_t>(j) * n + j];
          place += other > own || (other == own && j < i);
        }
      }
      order[place] = i;
    }
    __syncthreads();
  }

  __device__ void load(const double* gram, double shift, bool identity) const {
    for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
      const int i = e / n, j = e - i * n;
      if (j > i) continue;
      const double value = gram[static_cast<int64_t>(order[i]) * n + order[j]];
      at(i, j) = identity ? double(i == j) : value + (i == j ? shift : 0);
    }
    __syncthreads();
  }

  // (1) of a panel: rows from k0 on lose what the columns before k0 explain.
  __device__ void update_panel(int k0) const {
    const int lane = threadIdx.x % 32, part = lane % lanes, rows = blockDim.x / lanes;
    const double* panel_row[panel];
#pragma unroll
    for (int c = 0; c < panel; ++c) panel_row[c] = row(min(k0 + c, n - 1));
    for (int base = k0 + threadIdx.x / 32 * (32 / lanes); base < n; base += rows) {
      const int i = base + lane / lanes;
      const double* own = row(min(i, n - 1));
      double sum[panel] = {};
      for (int l = part; l < k0; l += lanes) {
        const double x = own[l];
#pragma unroll
        for (int c = 0; c < panel; ++c) sum[c] += x * panel_row[c][l];
      }
      sum_over_lanes(sum);
#pragma unroll
      for (int c = 0; c < panel; ++c)
        if (c % lanes == part && i < n && k0 + c <= i) at(i, k0 + c) -= sum[c];
    }
  }

  static __device__ __forceinline__ void sum_over_lanes(double (&sum)[panel]) {
#pragma unroll
    for (int bit = 1; bit < lanes; bit *= 2)
#pragma unroll
      for (int c = 0; c < panel; ++c) sum[c] += __shfl_xor_sync(full_warp, sum[c], bit);
  }

  // (2): the first warp, lane r with row k0 + r of the diagonal block.
  __device__ void factor_diagonal(int k0, const double* gram, double tolerance, double relative,
                                  bool defer) const {
    const int lane = threadIdx.x % 32, live = min(panel, n - k0);
    const int64_t own = order[min(k0 + lane, n - 1)];
    const double least = max(tolerance, relative * gram[own * n + own]);
    double a[panel];
#pragma unroll
    for (int c = 0; c < panel; ++c) a[c] = lane < live && c <= lane ? at(k0 + lane, k0 + c) : 0;
#pragma unroll
    for (int c = 0; c < panel; ++c) {
      const double pivot = __shfl_sync(full_warp, a[c], c);
      const bool keep = pivot > __shfl_sync(full_warp, least, c) && c < live;
      const double inverse = keep ? rsqrt(pivot) : 0;
      a[c] *= inverse;
      if (lane == 0 && c < live) inverse_pivot[k0 + c] = keep || !defer ? inverse : -1;
#pragma unroll
      for (int d = c + 1; d < panel; ++d) a[d] -= a[c] * __shfl_sync(full_warp, a[c], d);
      if (defer && !keep && lane == c) a[c] = 1;
    }
#pragma unroll
    for (int c = 0; c < panel; ++c)
      if (lane < live && c <= lane) at(k0 + lane, k0 + c) = a[c];
  }

  // (3): rows below the diagonal block.
  __device__ void solve_panel(int k0) const {
    for (int i = k0 + panel + threadIdx.x; i < n; i += blockDim.x) {
      double x[panel];
#pragma unroll
      for (int c = 0; c < panel; ++c) {
        x[c] = at(i, k0 + c);
#pragma unroll
        for (int m = 0; m < c; ++m) x[c] -= x[m] * at(k0 + c, k0 + m);
        x[c] *= max(inverse_pivot[k0 + c], 0.0);
        at(i, k0 + c) = x[c];
      }
    }
  }

  __device__ void factor(const double* gram, double tolerance, double relative, bool defer) const {
    for (int k0 = 0; k0 < n; k0 += panel) {
      update_panel(k0);
      __syncthreads();
      if (threadIdx.x < 32) factor_diagonal(k0, gram, tolerance, relative, defer);
      __syncthreads();
      solve_panel(k0);
      __syncthreads();
    }
  }

  // The first warp, lane c with column k0 + c of the inverted diagonal block.
  __device__ void invert_diagonal(int k0) const {
    const int lane = threadIdx.x % 32, live = min(panel, n - k0);
    double x[panel];
#pragma unroll
    for (int r = 0; r < panel; ++r) {
      double sum = r == lane ? -1 : 0;
#pragma unroll
      for (int m = 0; m < r; ++m)
        if (m >= lane && r < live) sum += at(k0 + r, k0 + m) * x[m];
      x[r] = r < live ? -sum * fabs(inverse_pivot[k0 + r]) : 0;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < panel; ++r)
      if (r < live && lane <= r) at(k0 + r, k0 + lane) = x[r];
  }

  // L⁻¹ of the kept rows and columns, in place; the others become zero.
  __device__ void invert() const {
    const int lane = threadIdx.x % 32, part = lane % lanes, rows = blockDim.x / lanes;
    const int slot = threadIdx.x / lanes;
    for (int k0 = (n - 1) / panel * panel; k0 >= 0; k0 -= panel) {
      if (threadIdx.x < 32) invert_diagonal(k0);
      const int begin = k0 + panel;
      for (int chunk = max(n - begin + rows - 1, 0) / rows - 1; chunk >= 0; --chunk) {
        const int i = begin + chunk * rows + slot;
        const double* own = row(min(i, n - 1));
        double y[panel] = {};
        if (i < n)
          for (int l = begin + part; l <= i; l += lanes) {
            const double x = own[l];
            const double* right = row(l) + k0;
#pragma unroll
            for (int c = 0; c < panel; ++c) y[c] += x * right[c];
          }
        sum_over_lanes(y);
        __syncthreads();  // the rows of this chunk are read until here, and the diagonal block is inverted
#pragma unroll
        for (int c = 0; c < panel; ++c) {
          if (c % lanes != part || i >= n) continue;
          double z = 0;
#pragma unroll
          for (int m = c; m < panel; ++m) z -= y[m] * at(k0 + m, k0 + c);
          at(i, k0 + c) = z;
        }
      }
      __syncthreads();
    }
  }

  // Which columns the output has: the kept ones first (packed), or each in its place. `source` is ready after
  // the next barrier.
  __device__ int find_source(bool pack) const {
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += kept(j);
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
      if (!pack) {
        source[j] = kept(j) ? j : n;
        continue;
      }
      int before = 0;
      for (int l = 0; l < j; ++l) before += kept(l);
      if (kept(j)) source[before] = j;
      if (j >= rank) source[j] = n;
    }
    return rank;
  }
};

template <class T>
__device__ void semidefinite_cholesky_in(const CholeskyProblem<T>& p, double* memory, double trace) {
  const int n = p.size;
  const PackedCholesky cholesky(memory, p.work, n, p.resident);
  cholesky.find_order(p.gram, p.sort != 0);
  cholesky.load(p.gram, p.shift * trace, trace == 0 && p.shift > 0 && p.factor != nullptr);
  cholesky.factor(p.gram, p.tolerance, p.relative, p.defer != 0);
  const int rank = cholesky.find_source(p.pack != 0);
  if (p.rank != nullptr && threadIdx.x == 0) *p.rank = rank;
  if (p.factor != nullptr)
    for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
      const int j = e / n, i = e - j * n;
      p.factor[j * n + cholesky.order[i]] = i >= j ? T(cholesky.at(i, j)) : T(0);
    }
  if (p.inverse == nullptr) return;
  __syncthreads();
  cholesky.invert();
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e - i * n, column = cholesky.source[j];
    p.inverse[cholesky.order[i] * n + j] = column < n && i <= column ? cholesky.at(column, i) : 0;
  }
}

template <class T>
__global__ void __launch_bounds__(semidefinite_cholesky_threads, 1)
    semidefinite_cholesky(const CholeskyProblem<T>* __restrict__ problems) {
  TK_DYN_SMEM(double, memory);
  TK_SHARED(double, part, [32]);
  TK_SHARED(int, flagged);
  const CholeskyProblem<T>& p = problems[blockIdx.x];
  // Atomic: problems may share a flag.
  if (threadIdx.x == 0) flagged = p.flag != nullptr && atomicOr(p.flag, 0) != 0;
  double trace = 0;
  for (int i = threadIdx.x; i < p.size; i += blockDim.x)
    trace += p.gram[static_cast<int64_t>(i) * p.size + i];
  trace = block_sum(trace, part);
  const bool finite = flagged == 0 && isfinite(trace);
  if (threadIdx.x == 0) {
    if (p.trace != nullptr) *p.trace = trace;
    if (!finite && p.flag != nullptr) atomicOr(p.flag, 1);
    if (!finite && p.rank != nullptr) *p.rank = -1;
  }
  if (!finite) return;
  semidefinite_cholesky_in(p, memory, trace);
}

}  // namespace tk
