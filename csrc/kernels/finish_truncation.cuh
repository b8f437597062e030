// The last word of a truncation: ranks and relative error of every core, one block each; and where one rank
// exceeds the product of the others, which leaves rows of that unfolding dependent, it is cut to the product.
//
//   error = sqrt(Σ_tiles squares / trace);  ranks[i] = found[i], or the full size where a mode was not cut
//   q = Π_{j≠i} r_j < r_i:  C_(i) = Q S with Q r_i×q orthonormal;  P_i ← P_i Q,  C ← C ×_i Qᵀ,  r_i ← q
//
// At most one mode of a core can have such a rank, and cutting it makes no other one infeasible. Nothing is
// lost, so the error stays. Q has the left singular vectors, by one-sided Jacobi on the q columns of C_(i) in
// double precision; 1e-13 ‖C‖ on its diagonal keeps Q complete where C_(i) is deficient. Layout: core and
// projections as hosvd_truncate leaves them, `work` as FinishProblem says. Numerics: float64, sums in a fixed
// order. Where the flag is set: error NaN, full ranks. Template: T = float, double.
#pragma once

#include "kernels/jacobi_svd.cuh"
#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

template <class T>
struct InfeasibleMode {
  const FinishProblem<T>& p;
  const int* rank;  // of every mode
  int mode, rows, columns;

  __device__ int64_t stride(int of) const {
    int64_t product = 1;
    for (int d = of + 1; d < p.modes; ++d) product *= p.size[d];
    return product;
  }

  // Where column c of the unfolding begins in the core: the other modes' indices, the last one fastest.
  __device__ int64_t column(int c) const {
    int64_t place = 0, step = 1;
    for (int d = p.modes - 1; d >= 0; step *= p.size[d--]) {
      if (d == mode) continue;
      place += c % rank[d] * step;
      c /= rank[d];
    }
    return place;
  }

  __device__ void cut(double* part) const {
    const int q = columns, size = p.size[mode];
    const int64_t along = stride(mode);
    double* spare = p.work + static_cast<int64_t>(rows) * q;
    JacobiColumns<double> a(spare + static_cast<int64_t>(size) * q, q, rows, p.work);
    double norm = 0;
    for (int e = threadIdx.x; e < rows * q; e += blockDim.x) {
      const double value = p.core[column(e / rows) + e % rows * along];
      p.work[e] = value;
      norm += value * value;
    }
    norm = sqrt(block_sum(norm, part));
    for (int c = threadIdx.x; c < q; c += blockDim.x) p.work[c * rows + c] += norm > 0 ? 1e-13 * norm : 1;
    __syncthreads();
    for (int s = 0; s < 30; ++s) {
      a.sum_squares();
      if (!a.sweep(1e-15)) break;
    }
    a.sort(0, false);
    const auto basis = [&](int i, int k) { return a.column(a.order[k])[i] / sqrt(a.squares[a.order[k]]); };
    // Through `spare`, since all of the old is needed for each of the new.
    T* projection = p.projections[mode];
    for (int e = threadIdx.x; e < size * q; e += blockDim.x) {
      double sum = 0;
      for (int i = 0; i < rows; ++i) sum += double(projection[e / q * size + i]) * basis(i, e % q);
      spare[e] = sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < size * rows; e += blockDim.x) {
      const int i = e / rows, k = e % rows;
      projection[i * size + k] = k < q ? T(spare[i * q + k]) : T(0);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < q * q; e += blockDim.x) {
      const int64_t from = column(e % q);
      double sum = 0;
      for (int i = 0; i < rows; ++i) sum += basis(i, e / q) * p.core[from + i * along];
      spare[e] = sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < rows * q; e += blockDim.x) {
      const int k = e / q, c = e % q;
      p.core[column(c) + k * along] = k < q ? T(spare[e]) : T(0);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(finish_threads, 1)
    finish_truncation(const FinishProblem<T>* __restrict__ problems) {
  TK_SHARED(int, rank, [8]);
  TK_SHARED(double, part, [finish_threads / 32]);
  const FinishProblem<T>& p = problems[blockIdx.x];
  const bool flagged = *p.flag != 0;
  double sum = 0;
  for (int t = threadIdx.x; t < p.tiles; t += blockDim.x) sum += p.squares[t];
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) {
    const double total = *p.trace;
    *p.error = flagged ? nan("") : total > 0 ? sqrt(sum / total) : 0;
  }
  for (int i = threadIdx.x; i < p.modes; i += blockDim.x) {
    const int64_t found = p.found[i];
    rank[i] = flagged || found < 0 ? p.size[i] : static_cast<int>(found);
  }
  __syncthreads();
  int infeasible = -1, columns = 0;
  for (int i = 0; i < p.modes && p.work != nullptr && !flagged; ++i) {
    int64_t others = 1;
    for (int d = 0; d < p.modes; ++d) others *= d == i ? 1 : rank[d];
    if (p.projections[i] == nullptr || rank[i] <= others) continue;
    infeasible = i;
    columns = static_cast<int>(others);
  }
  for (int i = threadIdx.x; i < p.width; i += blockDim.x)
    p.ranks[i] = i >= p.modes ? 0 : i == infeasible ? columns : rank[i];
  if (infeasible >= 0) InfeasibleMode<T>{p, rank, infeasible, rank[infeasible], columns}.cut(part);
}

}  // namespace tk
