// The machine under cuda_emu.h: one block at a time, one fiber per CUDA thread, barriers and warp primitives
// that check how they are used. See README.md for what is caught.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// The built-in variables of the running CUDA thread.
struct Builtins {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  unsigned lane;
};
extern Builtins* builtins;  // one launch runs at a time, on one host thread: no thread_local

// ---- Block -----------------------------------------------------------------------------------------------
struct BarrierResult {
  int any, all, count;
};
BarrierResult block_barrier(const char* where, int predicate);
// __threadfence, and any atomic: what comes before fence() and atomic(x) in one thread, with no barrier
// between the two, happens before what comes after atomic(x) and fence() in another.
void fence();
void atomic(void* address);
void* static_shared(const void* site, size_t bytes);
unsigned char* dynamic_shared();

// ---- Warp ------------------------------------------------------------------------------------------------
enum class WarpOperation { sync, shuffle, ballot, mma_f64 };
struct WarpCall {
  WarpOperation operation;
  const char* where;
  const void* in;  // this lane's value, `bytes` long
  void* out;       // shuffle: the value of lane `source`; ballot: unsigned; mma_f64: double[2], added to
  size_t bytes;
  unsigned source;
};
void warp_call(unsigned mask, WarpCall& call);

// ---- Launch ----------------------------------------------------------------------------------------------
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            void (*body)(void*), void* argument);
void allow_shared(const void* kernel, size_t bytes);  // cudaFuncSetAttribute
// The most shared memory of a block, static and dynamic together; 48 KiB of it without allow_shared.
constexpr size_t most_shared = 232448;
extern size_t shared_limit;
// Ends the launch; does not return, but is not declared so: AddressSanitizer would clean up the wrong stack.
void fail(const char* where, const char* what);

// CUDA's error of the calling thread, and whether the call that asks is the one that a test wants to fail.
extern int last_error, calls_until_failure;
inline bool fails_next() { return calls_until_failure >= 0 && calls_until_failure-- == 0; }

// The message of the first error since the last call, or null. Until it is taken, launches do nothing.
const char* take_error();
bool failed();

// 0: ascending, 1: descending, else shuffled anew, from this seed, each time all threads have had their turn.
void set_thread_order(unsigned seed);

}  // namespace emu
