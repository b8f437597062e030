#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "tucker_kernels.h"

namespace tk {
namespace {

enum Isa { isa_baseline, isa_avx2, isa_avx512 };

Isa choose() {
  Isa best = isa_baseline;
#if defined(TK_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = isa_avx2;
#endif
#if defined(TK_HAVE_AVX512)
  if (best == isa_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    best = isa_avx512;
#endif
  if (const char* limit = std::getenv("TK_ISA")) {
    if (!std::strcmp(limit, "baseline")) best = isa_baseline;
    if (!std::strcmp(limit, "avx2") && best > isa_avx2) best = isa_avx2;
  }
  return best;
}

[[maybe_unused]] Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace

template <>
const SimdTable<float>& simd<float>() {
#if defined(TK_HAVE_AVX512)
  if (isa() == isa_avx512) return avx512::table_f32;
#endif
#if defined(TK_HAVE_AVX2)
  if (isa() == isa_avx2) return avx2::table_f32;
#endif
  return baseline::table_f32;
}

template <>
const SimdTable<double>& simd<double>() {
#if defined(TK_HAVE_AVX512)
  if (isa() == isa_avx512) return avx512::table_f64;
#endif
#if defined(TK_HAVE_AVX2)
  if (isa() == isa_avx2) return avx2::table_f64;
#endif
  return baseline::table_f64;
}

bool winograd_allowed() {
  static const bool allowed = [] {
    const char* choice = std::getenv("TK_WINOGRAD");
    return !choice || std::strcmp(choice, "0");
  }();
  return allowed;
}

}  // namespace tk

const char* tk_cpu_isa(void) { return tk::simd<float>().isa; }

const char* tk_status_string(tk_status status) {
  switch (status) {
    case TK_OK:
      return "success";
    case TK_INVALID_ARGUMENT:
      return "a size, mode or pointer is out of range";
    case TK_UNSUPPORTED:
      return "this build or device does not support the operation";
    case TK_OUT_OF_MEMORY:
      return "out of memory";
    case TK_CUDA_ERROR:
      return "a CUDA call failed";
  }
  return "unknown status";
}
