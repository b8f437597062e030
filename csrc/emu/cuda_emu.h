// The CUDA C++ that device code may use, for g++: keywords, vector types, built-in variables, barriers, warp
// primitives, atomics, mathematics, and the few host calls launchers make. Anything else does not compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emu/runtime.h"

// ---- Keywords --------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define warpSize 32

#define threadIdx (emu::builtins->thread_index)
#define blockIdx (emu::builtins->block_index)
#define blockDim (emu::builtins->block_size)
#define gridDim (emu::builtins->grid_size)

// ---- Vector types ----------------------------------------------------------------------------------------
#define TK_EMU_VECTORS(T, name, align2, align4)              \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
TK_EMU_VECTORS(float, float, 8, 16)
TK_EMU_VECTORS(double, double, 16, 16)
TK_EMU_VECTORS(int, int, 8, 16)
TK_EMU_VECTORS(unsigned, uint, 8, 16)
#undef TK_EMU_VECTORS

// ---- Shared memory and launches (core/portability.h) -----------------------------------------------------
#define TK_SHARED(T, name, ...) \
  static char tk_site_##name;   \
  T(&name)                      \
  __VA_ARGS__ =                 \
      *reinterpret_cast<T(*) __VA_ARGS__>(emu::static_shared(&tk_site_##name, sizeof(T __VA_ARGS__)))
#define TK_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(emu::dynamic_shared())
#define TK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emu::launch_kernel(kernel, #kernel, (grid), (block), (shared_bytes), __VA_ARGS__))
#if defined(TK_EMU_TSAN)
#define TK_THREADS(n) ((n) < 128 ? (n) : 128)
#else
#define TK_THREADS(n) (n)
#endif

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace emu {
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
                          size_t shared_bytes, const Arguments&... arguments) {
  if (fails_next()) return static_cast<cudaError_t>(last_error = cudaErrorInvalidValue);
  auto body = [&] { kernel(arguments...); };
  launch(
      reinterpret_cast<const void*>(kernel), name, grid, block, shared_bytes,
      [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
  return failed() ? cudaErrorLaunchFailure : cudaSuccess;
}
}  // namespace emu

// ---- Barriers and warp primitives: macros, so that an error can say where --------------------------------
#define TK_EMU_STRING_(x) #x
#define TK_EMU_STRING(x) TK_EMU_STRING_(x)
#define TK_EMU_HERE(name) name " at " __FILE__ ":" TK_EMU_STRING(__LINE__)
#define __syncthreads() ((void)emu::block_barrier(TK_EMU_HERE("__syncthreads"), 0))
#define __syncthreads_or(p) (emu::block_barrier(TK_EMU_HERE("__syncthreads_or"), (p) != 0).any)
#define __syncthreads_and(p) (emu::block_barrier(TK_EMU_HERE("__syncthreads_and"), (p) != 0).all)
#define __syncthreads_count(p) (emu::block_barrier(TK_EMU_HERE("__syncthreads_count"), (p) != 0).count)
#define __syncwarp(...) emu::sync_warp(TK_EMU_HERE("__syncwarp"), ##__VA_ARGS__)
#define __shfl_sync(...) emu::shuffle(TK_EMU_HERE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) emu::shuffle_xor(TK_EMU_HERE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) emu::shuffle_down(TK_EMU_HERE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) emu::shuffle_up(TK_EMU_HERE("__shfl_up_sync"), __VA_ARGS__)
#define __ballot_sync(mask, p) emu::ballot(TK_EMU_HERE("__ballot_sync"), (mask), (p) != 0)
#define __any_sync(mask, p) (emu::ballot(TK_EMU_HERE("__any_sync"), (mask), (p) != 0) != 0)
#define __all_sync(mask, p) (emu::ballot(TK_EMU_HERE("__all_sync"), (mask), (p) == 0) == 0)
#define TK_EMU_MMA_F64(c, a, b) emu::mma_f64(TK_EMU_HERE("mma"), (c), (a), (b))  // kernels/warp.cuh
#define __nanosleep(ns) \
  ((void)(ns), emu::fail(TK_EMU_HERE("__nanosleep"), "the block waits for one that runs only after it"))
#define __trap() emu::fail(TK_EMU_HERE("__trap"), "the kernel called __trap()")

namespace emu {

inline void sync_warp(const char* where, unsigned mask = 0xffffffffu) {
  WarpCall call{WarpOperation::sync, where, nullptr, nullptr, 0, 0};
  warp_call(mask, call);
}

template <class T>
T shuffle_from(const char* where, unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "as CUDA's shuffles");
  T result;
  WarpCall call{WarpOperation::shuffle, where, &value, &result, sizeof(T), source};
  warp_call(mask, call);
  return result;
}

template <class T>
T shuffle(const char* where, unsigned mask, T value, int source, int width = 32) {
  return shuffle_from(where, mask, value, (builtins->lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
T shuffle_xor(const char* where, unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = builtins->lane, source = lane ^ bits;
  return shuffle_from(where, mask, value, source < (lane & ~(width - 1)) + width ? source : lane);
}

template <class T>
T shuffle_down(const char* where, unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = builtins->lane;
  return shuffle_from(where, mask, value,
                      (lane & (width - 1)) + delta < unsigned(width) ? lane + delta : lane);
}

template <class T>
T shuffle_up(const char* where, unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = builtins->lane;
  return shuffle_from(where, mask, value, (lane & (width - 1)) >= delta ? lane - delta : lane);
}

inline unsigned ballot(const char* where, unsigned mask, int predicate) {
  unsigned votes = 0;
  WarpCall call{WarpOperation::ballot, where, &predicate, &votes, sizeof predicate, 0};
  warp_call(mask, call);
  return votes;
}

inline void mma_f64(const char* where, double (&c)[2], double a, double b) {
  const double operands[2] = {a, b};
  WarpCall call{WarpOperation::mma_f64, where, operands, c, sizeof operands, 0};
  warp_call(0xffffffffu, call);
}

}  // namespace emu

// ---- Atomics: real ones, so that ThreadSanitizer knows them ----------------------------------------------
template <class T>
T atomicCAS(T* address, T expected, T desired) {
  emu::atomic(address);
  __atomic_compare_exchange(address, &expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
namespace emu {
template <class T, class F>
T atomic_update(T* address, F&& f) {
  atomic(address);
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do desired = f(old);
  while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace emu
#define TK_EMU_ATOMIC(name, expression)                                         \
  template <class T>                                                            \
  T name(T* address, std::common_type_t<T> value) {                             \
    return emu::atomic_update(address, [&](T old) -> T { return expression; }); \
  }
TK_EMU_ATOMIC(atomicAdd, old + value)
TK_EMU_ATOMIC(atomicMax, old < value ? value : old)
TK_EMU_ATOMIC(atomicMin, value < old ? value : old)
TK_EMU_ATOMIC(atomicOr, old | value)
TK_EMU_ATOMIC(atomicAnd, old& value)
TK_EMU_ATOMIC(atomicExch, (void(old), value))
#undef TK_EMU_ATOMIC
inline void __threadfence() { emu::fence(); }

// ---- Mathematics -----------------------------------------------------------------------------------------
using std::isfinite;
using std::isinf;
using std::isnan;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
#define TK_EMU_MINMAX(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
TK_EMU_MINMAX(int)
TK_EMU_MINMAX(unsigned)
TK_EMU_MINMAX(long)
TK_EMU_MINMAX(unsigned long)
TK_EMU_MINMAX(long long)
#undef TK_EMU_MINMAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
namespace emu {
template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace emu
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }

// ---- Host calls: device memory is host memory, a stream is the calling thread ----------------------------
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (emu::fails_next()) return static_cast<cudaError_t>(emu::last_error = cudaErrorInvalidValue);
  emu::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
// What the executor finds wrong with a kernel is not among them: emu::take_error() has it.
inline cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(std::exchange(emu::last_error, 0)); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "unspecified launch failure";
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
