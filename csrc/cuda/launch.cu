// Runs launch plans on a stream; the only file that launches kernels. Compiled by nvcc for GPUs, and by g++
// against csrc/emu for tests, where "device" pointers are host pointers.
#include <string>

#include "core/portability.h"
#include "cuda/operators.h"
#include "kernels/finish_truncation.cuh"
#include "kernels/gram.cuh"
#include "kernels/grouped_gemm.cuh"
#include "kernels/jacobi_svd.cuh"
#include "kernels/project_out.cuh"
#include "kernels/semidefinite_cholesky.cuh"
#include "kernels/triangular_product.cuh"

namespace tk {
namespace {

thread_local std::string error_text;  // for tk_cuda_error

// TK_OK, or TK_CUDA_ERROR with the words kept. Errors are those that our own calls return; an error of
// somebody else's earlier call stays where it is, and ours is taken away, so that nobody finds it after his
// own call.
tk_status checked(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return TK_OK;
  cudaGetLastError();
  error_text = std::string(what) + ": " + cudaGetErrorString(error);
  return TK_CUDA_ERROR;
}

tk_status store(const Plan& plan, void* workspace, cudaStream_t stream) {
  constexpr int groups = store_threads / 32;
  for (const TablePiece& piece : pieces(plan.table)) {
    const dim3 grid((piece.groups + groups - 1) / groups);
    const tk_status status = checked(TK_LAUNCH(store_table, grid, dim3(store_threads), 0, stream, piece,
                                               static_cast<uint32_t*>(workspace)),
                                     "store_table");
    if (status != TK_OK) return status;
  }
  return TK_OK;
}

// A launch on the way to its kernel.
struct Start {
  const Launch& launch;
  const char* table;
  cudaStream_t stream;
  int64_t shared_bytes;  // of a block of this device

  // Allows always as much as there is, whatever this launch takes: two threads of the host may launch one
  // kernel.
  template <class Function, class... Arguments>
  tk_status run(Function* kernel, int32_t threads, const Arguments&... arguments) const {
    const char* name = kernel_name(launch.kernel);
    const int64_t declared = static_shared_bytes(launch.kernel);
    if (launch.shared + declared > granted_shared_bytes) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared_bytes - declared));
      if (error != cudaSuccess) return checked(error, name);
    }
    return checked(TK_LAUNCH(kernel, dim3(launch.grid), dim3(threads), launch.shared, stream, arguments...),
                   name);
  }

  // A persistent grid over tiles.
  template <class Problem>
  tk_status tiles(void (*kernel)(const Problem*, int, int)) const {
    return run(kernel, launch.block, reinterpret_cast<const Problem*>(table), launch.count, launch.work);
  }

  // One block per problem, or some, with shared memory by the size of the problems.
  template <class Problem>
  tk_status blocks(void (*kernel)(const Problem*)) const {
    return run(kernel, TK_THREADS(launch.block), reinterpret_cast<const Problem*>(table));
  }
  template <class Problem>
  tk_status blocks(void (*kernel)(const Problem*, int)) const {
    return run(kernel, TK_THREADS(launch.block), reinterpret_cast<const Problem*>(table), launch.count);
  }
};

template <class T>
tk_status start(const Start& start) {
  switch (start.launch.kernel) {
#define TK_KERNEL(name, Problem, how, bytes) \
  case Kernel::name:                         \
    return start.how(name<T>);
    TK_KERNELS(TK_KERNEL)
#undef TK_KERNEL
  }
  return TK_UNSUPPORTED;
}

// In the emulator a small device, so that tests see blocks with several tiles and problems too large for one
// block.
tk_status current_device(Device* device) {
#if defined(TK_EMU)
  *device = {2, static_cast<int64_t>(emu::shared_limit)};
#else
  int index = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error != cudaSuccess) return checked(error, "the current device");
  device->shared_bytes = shared;
#endif
  return TK_OK;
}

// Plans for this device, answers how much workspace that needs, and runs the plan where there is a workspace.
template <class Problem, class... Rest>
tk_status run(PlanFunction<Problem, Rest...> make, tk_dtype dtype, const Problem* problems, int64_t count,
              void* workspace, int64_t* workspace_bytes, void* stream_handle, Rest... rest) {
  Device device{};
  Plan plan;
  tk_status status = current_device(&device);
  if (status == TK_OK) status = make(dtype, problems, count, workspace, device, &plan, rest...);
  if (status != TK_OK) return status;
  if (!workspace) {
    *workspace_bytes = plan.workspace;
    return TK_OK;
  }
  if (*workspace_bytes < plan.workspace) return TK_INVALID_ARGUMENT;
  char* base = static_cast<char*>(workspace);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  status = store(plan, workspace, stream);
  for (const Launch& launch : plan.launches) {
    if (status != TK_OK) break;
    const Start next{launch, base + launch.table, stream, device.shared_bytes};
    status = plan.dtype == TK_FLOAT64 ? start<double>(next) : start<float>(next);
  }
  return status;
}

}  // namespace
}  // namespace tk

const char* tk_cuda_architectures(void) { return TK_CUDA_ARCHITECTURES; }

const char* tk_cuda_error(void) { return tk::error_text.c_str(); }

const char* tk_cuda_unusable(void) {
#if !defined(TK_EMU)
  cudaFuncAttributes found;
  if (tk::checked(cudaFuncGetAttributes(&found, tk::store_table), "loading the kernels") != TK_OK)
    return tk::error_text.c_str();
#endif
  return "";
}

#define TK_OPERATOR(name)                                                                        \
  tk_status tk_##name##_cuda(tk_dtype dtype, const tk_##name##_problem* problems, int64_t count, \
                             void* workspace, int64_t* workspace_bytes, void* stream) {          \
    return tk::run(tk::name##_plan, dtype, problems, count, workspace, workspace_bytes, stream); \
  }
TK_OPERATOR(multi_mode_dot)
TK_OPERATOR(cross_gram)
TK_OPERATOR(rotate_bases)
TK_OPERATOR(gram_solve)
TK_OPERATOR(batched_qr)
TK_OPERATOR(batched_svd)
#undef TK_OPERATOR

tk_status tk_tangent_basis_cuda(tk_dtype dtype, const tk_tangent_basis_problem* problems, int64_t count,
                                int64_t* counts, void* workspace, int64_t* workspace_bytes, void* stream) {
  return tk::run(tk::tangent_basis_plan, dtype, problems, count, workspace, workspace_bytes, stream, counts);
}

tk_status tk_hosvd_truncate_cuda(tk_dtype dtype, const tk_hosvd_truncate_problem* problems, int64_t count,
                                 const double* tol, int per_mode, int64_t* ranks, int64_t width,
                                 double* errors, void* workspace, int64_t* workspace_bytes, void* stream) {
  return tk::run(tk::hosvd_truncate_plan, dtype, problems, count, workspace, workspace_bytes, stream, tol,
                 per_mode, ranks, width, errors);
}
