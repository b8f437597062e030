// Runs launch plans on a stream; the only file that launches kernels. Compiled by nvcc for GPUs, and by g++
// against csrc/emu for tests, where "device" pointers are host pointers.
#include <algorithm>

#include "core/portability.h"
#include "cuda/operators.h"
#include "kernels/grouped_gemm.cuh"

namespace tk {
namespace {

void store(const Plan& plan, char* workspace, cudaStream_t stream) {
  constexpr size_t piece_bytes = sizeof(TablePiece);
  for (size_t at = 0; at < plan.table.size(); at += piece_bytes) {
    TablePiece piece;
    const size_t bytes = std::min(piece_bytes, plan.table.size() - at);
    std::memcpy(&piece, plan.table.data() + at, bytes);
    TK_LAUNCH(store_table, dim3(1), dim3(256), 0, stream, piece,
              reinterpret_cast<TablePiece::Word*>(workspace + at),
              static_cast<int>(bytes / sizeof(TablePiece::Word)));
  }
}

template <class T>
tk_status start(const Launch& launch, char* workspace, cudaStream_t stream) {
  const dim3 grid(launch.grid), block(launch.block);
  const auto* table = workspace + launch.table;
  switch (launch.kernel) {
    case Kernel::grouped_gemm:
      TK_LAUNCH(grouped_gemm<T>, grid, block, launch.shared, stream,
                reinterpret_cast<const GemmProblem<T>*>(table), launch.count, launch.work);
      return TK_OK;
    default:
      return TK_UNSUPPORTED;
  }
}

// A small number in the emulator, so that tests see blocks with several tiles.
tk_status multiprocessors(int32_t* count) {
#if defined(TK_EMU)
  *count = 2;
#else
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return TK_CUDA_ERROR;
  if (cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return TK_CUDA_ERROR;
#endif
  return TK_OK;
}

// Plans for this device, answers how much workspace that needs, and runs the plan where there is a workspace.
template <class MakePlan>
tk_status run(void* workspace, int64_t* workspace_bytes, void* stream_handle, MakePlan&& make) {
  Plan plan;
  int32_t available = 1;
  tk_status status = workspace ? multiprocessors(&available) : TK_OK;
  if (status == TK_OK) status = make(workspace, available, &plan);
  if (status != TK_OK) return status;
  if (!workspace) {
    *workspace_bytes = plan.workspace;
    return TK_OK;
  }
  if (*workspace_bytes < plan.workspace) return TK_INVALID_ARGUMENT;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  store(plan, static_cast<char*>(workspace), stream);
  for (const Launch& launch : plan.launches) {
    status = plan.dtype == TK_FLOAT64 ? start<double>(launch, static_cast<char*>(workspace), stream)
                                      : start<float>(launch, static_cast<char*>(workspace), stream);
    if (status != TK_OK) return status;
  }
  return cudaGetLastError() == cudaSuccess ? TK_OK : TK_CUDA_ERROR;
}

}  // namespace
}  // namespace tk

const char* tk_cuda_architectures(void) { return TK_CUDA_ARCHITECTURES; }

tk_status tk_multi_mode_dot_cuda(tk_dtype dtype, int32_t count, const tk_mode_products* problems,
                                 void* workspace, int64_t* workspace_bytes, void* stream) {
  return tk::run(workspace, workspace_bytes, stream, [&](void* at, int32_t multiprocessors, tk::Plan* plan) {
    return tk::multi_mode_dot_plan(dtype, count, problems, at, multiprocessors, plan);
  });
}
