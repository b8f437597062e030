// Optimiser step on augmented cores, all of them in one launch: zero-padding, SGD with momentum or Adam, and
// the norm of the result, with one read of every operand.
//
//   c = core inside its shape, 0 beyond;  SGD: g += λc, m = μm + (1−δ)g, c −= η (g + μm, m or g)
//   Adam: g += λc or c *= 1 − ηλ, m = β₁m + (1−β₁)g, v = β₂v + (1−β₂)g², c −= η/(1−β₁ᵗ) m / (√v/√(1−β₂ᵗ) + ε)
//
// Layout: all contiguous; core and old states have `shape`, gradient and results `augmented` (StepProblem);
// dimensions that are not padded are merged into their neighbours by the plan. Tiling: 256 threads take 1,024
// elements. Numerics: the step in T, as torch does it. Squares are summed in float64: within a tile in a
// fixed order, and the tiles in order by whichever block finishes last, so the norm does not depend on the
// grid. Template: T = float, double.
#pragma once

#include "kernels/limits.h"
#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

// Where element e of the augmented core lies in the small one, or −1.
template <class T>
__device__ __forceinline__ int64_t inside(const StepProblem<T>& p, int e) {
  int64_t at = 0, stride = 1;
  bool within = true;
  for (int d = p.dims - 1; d >= 0; --d) {
    const int rest = e / p.augmented[d], i = e - rest * p.augmented[d];
    within &= i < p.shape[d];
    at += i * stride;
    stride *= p.shape[d];
    e = rest;
  }
  return within ? at : -1;
}

template <class T>
__device__ __forceinline__ T step_one(const StepProblem<T>& p, int e) {
  const int64_t at = inside(p, e);
  T c = at >= 0 ? p.core[at] : T(0), g = p.gradient[e];
  T first = at >= 0 && p.first != nullptr ? p.first[at] : T(0);
  g += p.weight_decay * c;
  if (p.adam) {
    T second = at >= 0 && p.second != nullptr ? p.second[at] : T(0);
    c *= p.decay;
    first = p.beta1 * first + (T(1) - p.beta1) * g;
    second = p.beta2 * second + (T(1) - p.beta2) * g * g;
    c -= p.step_size * first / (sqrt(second) / p.root_correction + p.epsilon);
    if (p.new_second != nullptr) p.new_second[e] = second;
  } else {
    T direction = g;
    if (p.momentum != T(0)) {
      first = p.momentum * first + p.damped * g;
      direction = p.nesterov ? g + p.momentum * first : first;
    }
    c -= p.lr * direction;
  }
  if (p.new_first != nullptr) p.new_first[e] = first;
  p.new_core[e] = c;
  return c;
}

template <class T>
__global__ void __launch_bounds__(step_threads)
    core_step(const StepProblem<T>* __restrict__ problems, int count, int tiles) {
  TK_SHARED(double, part, [step_threads / 32]);
  TK_SHARED(int, last, [1]);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const StepProblem<T>& p = problems[problem_of_tile(problems, count, tile)];
    const int own = tile - p.first_tile;
    double squares = 0;
    for (int i = threadIdx.x; i < step_tile; i += step_threads) {
      const int64_t e = int64_t{own} * step_tile + i;
      if (e >= p.elements) break;
      const double value = step_one(p, static_cast<int>(e));
      squares += value * value;
    }
    if (p.norm == nullptr) continue;
    squares = block_sum(squares, part);
    if (threadIdx.x == 0) {
      p.squares[own] = squares;
      __threadfence();
      last[0] = atomicAdd(p.finished, 1) == p.tiles - 1;
    }
    __syncthreads();
    if (last[0]) {
      __threadfence();
      double sum = 0;
      const volatile double* squares_of_all = p.squares;  // not from this multiprocessor's cache
      for (int t = threadIdx.x; t < p.tiles; t += step_threads) sum += squares_of_all[t];
      sum = block_sum(sum, part);
      if (threadIdx.x == 0) *p.norm = sqrt(sum);
    }
    __syncthreads();  // last and part are read until here
  }
}

}  // namespace tk
