// The device code as a shared library for tests (loaded by tests/emu/emulator.py): every kernel by name, on
// host memory, and the CUDA functions of tucker_kernels.h, whose launch plans and launch.cu run here as they
// do on a GPU. Launches report through tk_emu_take_error.
#include <cstring>
#include <string>
#include <utility>

#define TK_CUDA_ARCHITECTURES "the host"
#include "cuda/launch.cu"
#include "emu/sample.cuh"

#define TK_EXPORT extern "C" __attribute__((visibility("default")))

TK_EXPORT const char* tk_emu_take_error() { return emu::take_error(); }
TK_EXPORT const char* tk_emu_sanitizer() {
#if defined(TK_EMU_ASAN)
  return "address";
#elif defined(TK_EMU_TSAN)
  return "thread";
#else
  return "";
#endif
}
TK_EXPORT void tk_emu_set_thread_order(unsigned seed) { emu::set_thread_order(seed); }

// CUDA's error of the calling thread: `code` instead of what it is, which is returned.
TK_EXPORT int tk_emu_exchange_error(int code) { return std::exchange(emu::last_error, code); }
// The call after this many that succeed (launches and cudaFuncSetAttribute) is refused; -1: none.
TK_EXPORT void tk_emu_fail_after(int calls) { emu::calls_until_failure = calls; }

// One launch of one kernel on a table as it stands; `work` is the number of tiles of a persistent grid.
TK_EXPORT int tk_emu_launch(const char* kernel, tk_dtype dtype, const void* table, int count, int work,
                            int grid, int block, int64_t shared) {
  for (int i = 0; std::strcmp(tk::kernel_name(tk::Kernel(i)), "unknown"); ++i) {
    if (std::strcmp(tk::kernel_name(tk::Kernel(i)), kernel)) continue;
    const tk::Launch launch{tk::Kernel(i), 0, count, work, grid, block, shared};
    const tk::Start start{launch, static_cast<const char*>(table), nullptr, emu::most_shared};
    const size_t before = std::exchange(emu::shared_limit, emu::most_shared);
    const tk_status status = dtype == TK_FLOAT64 ? tk::start<double>(start) : tk::start<float>(start);
    emu::shared_limit = before;
    return status;
  }
  return TK_INVALID_ARGUMENT;
}

// The size of a problem, so that the Python side can tell that it knows the layout.
TK_EXPORT int64_t tk_emu_problem_bytes(const char* kernel, tk_dtype dtype) {
  const std::string asked = kernel;
#define TK_KERNEL(name, Problem, how, bytes) \
  if (asked == #name) return dtype == TK_FLOAT64 ? sizeof(tk::Problem<double>) : sizeof(tk::Problem<float>);
  TK_KERNELS(TK_KERNEL)
#undef TK_KERNEL
  return -1;
}

namespace {

template <tk::Mistake mistake>
void sample(const float* x, int rows, int n, float* mirrored, float* sum) {
  TK_LAUNCH(tk::mirror_and_sum<mistake>, rows, n, n * sizeof(float), nullptr, x, mirrored, sum);
}

}  // namespace

TK_EXPORT void tk_emu_sample(int mistake, const float* x, int rows, int n, float* mirrored, float* sum) {
  using tk::Mistake;
  switch (static_cast<Mistake>(mistake)) {
#define TK_CASE(name) \
  case Mistake::name: \
    return sample<Mistake::name>(x, rows, n, mirrored, sum);
    TK_CASE(none)
    TK_CASE(missing_barrier)
    TK_CASE(off_by_one)
    TK_CASE(overrun)
    TK_CASE(wrong_mask)
    TK_CASE(source_outside)
    TK_CASE(divergent_barrier)
    TK_CASE(early_exit)
    TK_CASE(shuffle_as_barrier)
    TK_CASE(racing_blocks)
#undef TK_CASE
  }
}
