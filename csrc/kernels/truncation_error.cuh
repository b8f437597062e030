// The last word of a truncation: ranks and relative error of every core, one warp each.
//
//   error = sqrt(Σ_tiles squares / trace);  ranks[i] = found[i], or the full size where a mode was not cut
//
// Numerics: float64, tiles summed in a fixed order. Where the flag is set: error NaN, full ranks.
#pragma once

#include "kernels/problems.h"
#include "kernels/table.cuh"

namespace tk {

__global__ void __launch_bounds__(32) truncation_error(const ErrorProblem* __restrict__ problems) {
  const ErrorProblem& p = problems[blockIdx.x];
  const bool flagged = *p.flag != 0;
  double sum = 0;
  for (int t = threadIdx.x; t < p.tiles; t += 32) sum += p.squares[t];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) {
    const double total = *p.trace;
    *p.error = flagged ? nan("") : total > 0 ? sqrt(sum / total) : 0;
  }
  for (int i = threadIdx.x; i < p.width; i += 32) {
    const int64_t found = i < p.modes ? p.found[i] : 0;
    p.ranks[i] = i >= p.modes ? 0 : flagged || found < 0 ? p.size[i] : found;
  }
}

}  // namespace tk
