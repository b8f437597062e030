// The launch plans of the operators in tucker_kernels_cuda.h, as pure host functions that tests can call.
// workspace may be null when only its size is wanted; multiprocessors is that of the device.
#pragma once

#include "cuda/plan.h"
#include "tucker_kernels_cuda.h"

namespace tk {

// Rows, columns and flattened indices must stay below this (kernels count them in 32 bits).
constexpr int64_t largest_index = int64_t(1) << 31;

tk_status multi_mode_dot_plan(tk_dtype dtype, int32_t count, const tk_mode_products* problems,
                              void* workspace, int32_t multiprocessors, Plan* plan);

}  // namespace tk
