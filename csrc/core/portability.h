// What lets one .cuh compile for a GPU (nvcc) and for the host executor of csrc/emu (g++ with TK_EMU).
//
//   TK_SHARED(T, name, [N][M]);    static shared memory, uninitialised; the brackets may be left out
//   TK_DYN_SMEM(T, name);          the launch's dynamic shared memory as a T*, 16-byte aligned
//   TK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)   the launch's own cudaError_t
//   TK_THREADS(n)                  threads per block: n, fewer under ThreadSanitizer
//
// A kernel that uses TK_THREADS must be correct for every multiple of 32. A kernel name with commas goes in
// parentheses: TK_LAUNCH((f<float, 4>), ...).
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <type_traits>

#define TK_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define TK_DYN_SMEM(T, name)                                         \
  extern __shared__ __align__(16) unsigned char tk_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(tk_dynamic_shared)
#define TK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  tk::launch_kernel(kernel, (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
#define TK_THREADS(n) (n)

namespace tk {
// kernel<<<…>>>(…) would leave its error among those of everybody's earlier calls.
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, const std::common_type_t<Parameters>&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared_bytes,
                          stream);
}
}  // namespace tk

#elif defined(TK_EMU)

#include "emu/cuda_emu.h"

#else
#error "device code needs nvcc, or g++ with TK_EMU defined"
#endif
