// Compiled without instrumentation: ThreadSanitizer would see the scheduler's own bookkeeping as races, and
// AddressSanitizer would not follow it across stacks. They are told what CUDA promises instead: __syncthreads
// and __syncwarp order memory, shuffles and votes do not, and blocks of one launch are not ordered among each
// other, but by a fence before an atomic in one thread and an atomic before a fence in another.
#include "emu/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "emu/fiber.h"

#if defined(TK_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

Builtins* builtins = nullptr;
int last_error = 0, calls_until_failure = -1;
size_t shared_limit = 101376;  // a small GPU's (sm_86, sm_89)

namespace {

constexpr unsigned warp_size = 32, max_threads = 1024;
constexpr size_t max_static_shared = 48 * 1024;
constexpr unsigned char canary = 0xA5;

enum class State { ready, at_barrier, in_warp_call, finished };

struct Thread {
  Builtins builtins;
  Fiber fiber;
  State state;
  const char* where;  // of the call it waits in
  bool fenced;        // since its last barrier
  void* read;         // by its last atomic, and not yet fenced
};

// The lanes of one mask on their way into a warp primitive.
struct Group {
  unsigned mask, arrived, generation;
  WarpCall* calls[warp_size];
  char tags[2];
};
struct Warp {
  Group groups[warp_size];  // by the mask's lowest lane, so that disjoint masks run side by side
};

// memcpy and memset would be intercepted by ThreadSanitizer also from here.
template <class Word>
void copy_words(void* to, const void* from, size_t count) {
  auto* t = static_cast<volatile Word*>(to);
  auto* f = static_cast<const volatile Word*>(from);
  for (size_t i = 0; i < count; ++i) t[i] = f[i];
}
void copy(void* to, const void* from, size_t bytes) {
  if (bytes % 8 == 0)
    copy_words<uint64_t>(to, from, bytes / 8);
  else
    copy_words<uint32_t>(to, from, bytes / 4);
}
void fill(void* to, unsigned char byte, size_t bytes) {
  auto* t = static_cast<volatile unsigned char*>(to);
  for (size_t i = 0; i < bytes; ++i) t[i] = byte;
}

// The shared memory of the running block: the dynamic part and each static array, NaN when the block starts,
// with guards between them. AddressSanitizer is told that the guards are out of bounds; without it, they show
// an overwrite when the block ends.
class SharedMemory {
 public:
  void reset(size_t dynamic_bytes, size_t limit) {
    limit_ = limit;
#if defined(TK_EMU_TSAN)
    // Threads of different blocks are unordered: the same address would look like a race.
    if (memory_) munmap(memory_, capacity);
    memory_ = nullptr;
#endif
    if (!memory_) {
      void* memory = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) std::abort();
      memory_ = static_cast<unsigned char*>(memory);
    }
    protect(memory_, capacity);
    count_ = 0;
    used_ = 0;
    statics_ = 0;
    put_guard();
    grant(nullptr, dynamic_bytes);
  }
  unsigned char* dynamic() const { return memory_ + arrays_[0].offset; }
  // The array of this declaration, made by the first thread that comes by; null when there is no room.
  unsigned char* find(const void* site, size_t bytes) {
    for (int i = 1; i < count_; ++i)
      if (arrays_[i].site == site) return memory_ + arrays_[i].offset;
    statics_ += bytes;
    if (count_ == max_arrays || statics_ > max_static_shared || statics_ + arrays_[0].bytes > limit_)
      return nullptr;
    return grant(site, bytes);
  }
  bool intact() {
    unprotect(memory_, used_);
    size_t at = 0;
    for (int i = 0; i <= count_; ++i) {
      const size_t end = i < count_ ? arrays_[i].offset : used_;
      for (; at < end; ++at)
        if (memory_[at] != canary) return false;
      if (i < count_) at += arrays_[i].bytes;
    }
    return true;
  }

 private:
  static constexpr int max_arrays = 64;
  static constexpr size_t guard = 64,
                          capacity = most_shared + max_static_shared + (max_arrays + 1) * 2 * guard;
  struct Array {
    const void* site;
    size_t offset, bytes;
  };

  unsigned char* grant(const void* site, size_t bytes) {
    arrays_[count_++] = {site, used_, bytes};
    unsigned char* at = memory_ + used_;
    unprotect(at, bytes);
    fill(at, 0xFF, bytes);
    used_ += bytes;
    put_guard();
    return at;
  }
  void put_guard() {
    const size_t end = (used_ + 2 * guard - 1) / guard * guard;
    unprotect(memory_ + used_, end - used_);
    fill(memory_ + used_, canary, end - used_);
    protect(memory_ + used_, end - used_);
    used_ = end;
  }
#if defined(TK_EMU_ASAN)
  static void protect(void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
  static void unprotect(void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
  static void protect(void*, size_t) {}
  static void unprotect(void*, size_t) {}
#endif

  unsigned char* memory_ = nullptr;
  Array arrays_[max_arrays];
  int count_ = 0;
  size_t used_ = 0, statics_ = 0, limit_ = 0;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  unsigned size = 0;
  Thread* running = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  // barrier
  unsigned arrived, generation;
  const char* where;
  BarrierResult pending, result;
  std::unique_ptr<char[]> tags;  // two
  SharedMemory shared;
};

Block block;
char block_begins, block_ends;  // tags: the scheduler before every thread, every thread before the host
unsigned thread_order = 0;
const char* failure = nullptr;  // what a thread found; becomes the error once the scheduler runs
std::string error;
std::string taken_error;
std::mutex one_launch;
std::map<const void*, size_t> allowed_shared;
const char* kernel_name = "";

void record(const std::string& what) {
  if (!error.empty()) return;
  error = std::string(kernel_name) + ": " + what;
  if (!builtins) return;
  const uint3 b = builtins->block_index;
  char text[160];
  std::snprintf(text, sizeof text, "; block (%u,%u,%u)", b.x, b.y, b.z);
  error += text;
  const char* last = nullptr;
  int shown = 0;
  for (unsigned t = 0; t < block.size && shown < 12; ++t) {
    const Thread& x = *block.threads[t];
    const char* at = x.state == State::finished ? "finished" : x.state == State::ready ? "running" : x.where;
    if (last && !std::strcmp(at, last)) continue;
    std::snprintf(text, sizeof text, "\n  from thread %u: %s", t, at);
    error += text;
    last = at;
    ++shown;
  }
}

void wait(State state, const char* where) {
  Thread& me = *block.running;
  me.state = state;
  me.where = where;
  me.fiber.yield();
}

bool same_place(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

void thread_entry() {
  Thread& me = *block.running;
  me.fiber.entered();
  acquire(&block_begins);
  block.body(block.argument);
  release(&block_ends);
  me.state = State::finished;
  me.fiber.yield(true);
}

void complete(Group& group) {
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (!(group.mask >> lane & 1)) continue;
    WarpCall& call = *group.calls[lane];
    switch (call.operation) {
      case WarpOperation::sync:
        break;
      case WarpOperation::shuffle:
        copy(call.out, group.calls[call.source]->in, call.bytes);
        break;
      case WarpOperation::ballot: {
        unsigned votes = 0;
        for (unsigned l = 0; l < warp_size; ++l)
          if (group.mask >> l & 1) votes |= (*static_cast<const int*>(group.calls[l]->in) != 0) << l;
        copy(call.out, &votes, sizeof votes);
        break;
      }
      case WarpOperation::mma_f64: {  // mma.sync.m8n8k4: lane l has a[l/4][l%4], b[l%4][l/4],
                                      // c[l/4][2(l%4)+{0,1}]
        const auto value = [&](unsigned l, int operand) {
          double x;
          copy(&x, static_cast<const double*>(group.calls[l]->in) + operand, sizeof x);
          return x;
        };
        for (unsigned v = 0; v < 2; ++v)
          for (unsigned k = 0; k < 4; ++k)
            static_cast<double*>(call.out)[v] +=
                value(lane / 4 * 4 + k, 0) * value((2 * (lane % 4) + v) * 4 + k, 1);
        break;
      }
    }
  }
}

void prepare_block(dim3 grid, dim3 shape, uint3 index, size_t shared_bytes, size_t limit) {
  block.arrived = block.generation = 0;
  block.where = nullptr;
  block.pending = block.result = {0, 1, 0};
  block.shared.reset(shared_bytes, limit);
  // Allocated anew: to ThreadSanitizer the old tags would order this block after those before it.
  block.tags = std::make_unique<char[]>(2);
  block.warps = std::vector<Warp>((block.size + warp_size - 1) / warp_size);
  for (unsigned t = 0; t < block.size; ++t) {
    Thread& thread = *block.threads[t];
    thread.builtins = {
        {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)}, index, shape, grid, t % 32};
    thread.state = State::ready;
    thread.where = "";
    thread.fenced = false;
    thread.read = nullptr;
    thread.fiber.start(thread_entry);
  }
}

void run_block(std::mt19937& random) {
  std::vector<unsigned> order(block.size);
  for (unsigned i = 0; i < block.size; ++i) order[i] = thread_order == 1 ? block.size - 1 - i : i;
  for (unsigned left = block.size; left > 0 && error.empty();) {
    if (thread_order > 1) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (unsigned t : order) {
      Thread& thread = *block.threads[t];
      if (thread.state != State::ready) continue;
      moved = true;
      block.running = &thread;
      builtins = &thread.builtins;
      thread.fiber.resume();
      if (failure) break;
      left -= thread.state == State::finished;
    }
    if (failure) record(failure);
    if (!moved && left > 0) record("not every thread reaches the same barrier or warp primitive");
  }
  if (!block.shared.intact()) record("a write outside shared memory");
  builtins = nullptr;
  for (unsigned t = 0; t < block.size; ++t) {
    Thread& thread = *block.threads[t];
    if (thread.state != State::finished) thread.fiber.abandon(&block_ends);
    thread.fiber.retire();
  }
  failure = nullptr;
}

}  // namespace

void fail(const char* where, const char* what) {
  Thread& me = *block.running;
  me.where = where;
  me.state = State::in_warp_call;  // so that the report says where
  failure = what;
  me.fiber.yield(true);
}

BarrierResult block_barrier(const char* where, int predicate) {
  if (block.arrived == 0) {
    block.pending = {0, 1, 0};
    block.where = where;
  } else if (!same_place(where, block.where)) {
    fail(where, "threads of a block meet at different barriers");
  }
  const unsigned parity = block.generation & 1;
  block.pending.any |= predicate != 0;
  block.pending.all &= predicate != 0;
  block.pending.count += predicate != 0;
  release(&block.tags[parity]);
  if (++block.arrived == block.size) {
    block.arrived = 0;
    ++block.generation;
    block.result = block.pending;
    for (unsigned t = 0; t < block.size; ++t)
      if (block.threads[t]->state == State::at_barrier) block.threads[t]->state = State::ready;
  } else {
    wait(State::at_barrier, where);
  }
  acquire(&block.tags[parity]);
  block.running->fenced = false;
  block.running->read = nullptr;
  return block.result;
}

void fence() {
  if (block.running->read) acquire(block.running->read);
  block.running->fenced = true;
}

void atomic(void* address) {
  if (block.running->fenced) release(address);
  block.running->read = address;
}

void warp_call(unsigned mask, WarpCall& call) {
  const unsigned lane = builtins->lane;
  const unsigned thread =
      builtins->thread_index.x +
      builtins->block_size.x * (builtins->thread_index.y + builtins->block_size.y * builtins->thread_index.z);
  const unsigned first = thread - lane;
  if (!(mask >> lane & 1)) fail(call.where, "a lane calls a warp primitive whose mask leaves it out");
  if (call.operation == WarpOperation::shuffle && !(mask >> call.source & 1))
    fail(call.where, "a shuffle reads from a lane outside its mask");
  Warp& warp = block.warps[first / warp_size];
  Group& group = warp.groups[__builtin_ctz(mask)];
  for (Group& other : warp.groups)
    if (other.arrived && (&other == &group ? other.mask != mask : (other.mask & mask) != 0))
      fail(call.where, "lanes of a warp disagree about the mask");
  if (group.arrived) {
    const WarpCall& earlier = *group.calls[__builtin_ctz(group.arrived)];
    if (!same_place(earlier.where, call.where))
      fail(call.where, "lanes of a warp meet at different primitives");
  }
  const unsigned parity = group.generation & 1;
  const bool orders_memory = call.operation == WarpOperation::sync;
  group.mask = mask;
  group.calls[lane] = &call;
  if (orders_memory) release(&group.tags[parity]);
  group.arrived |= 1u << lane;
  if (group.arrived == mask) {
    complete(group);
    group.arrived = 0;
    ++group.generation;
    for (unsigned l = 0; l < warp_size; ++l)
      if (mask >> l & 1 && l != lane) block.threads[first + l]->state = State::ready;
  } else {
    wait(State::in_warp_call, call.where);
  }
  if (orders_memory) acquire(&group.tags[parity]);
}

void* static_shared(const void* site, size_t bytes) {
  unsigned char* memory = block.shared.find(site, bytes);
  if (!memory) fail("TK_SHARED", "more shared memory than a block can have");
  return memory;
}

unsigned char* dynamic_shared() { return block.shared.dynamic(); }

void allow_shared(const void* kernel, size_t bytes) { allowed_shared[kernel] = bytes; }

void launch(const void* kernel, const char* name, dim3 grid, dim3 shape, size_t shared_bytes,
            void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!error.empty()) return;
  kernel_name = name;
  const uint64_t threads = uint64_t{shape.x} * shape.y * shape.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto allowed = allowed_shared.extract(kernel);  // each launch asks anew: no test relies on another's
  const size_t most = allowed ? allowed.mapped() : max_static_shared;
  if (threads == 0 || threads > max_threads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return record("grid or block size out of range");
  if (shared_bytes > most || most > shared_limit)
    return record("more dynamic shared memory than the kernel was allowed (cudaFuncSetAttribute)");
  block.size = static_cast<unsigned>(threads);
  block.body = body;
  block.argument = argument;
  while (block.threads.size() < threads) block.threads.push_back(std::make_unique<Thread>());
  std::mt19937 random(thread_order);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        prepare_block(grid, shape, {x, y, z}, shared_bytes,
                      allowed ? shared_limit - (most - shared_bytes) : max_static_shared);
        release(&block_begins);
        run_block(random);
      }
  acquire(&block_ends);
}

bool failed() { return !error.empty(); }

const char* take_error() {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (error.empty()) return nullptr;
  taken_error.swap(error);
  error.clear();
  return taken_error.c_str();
}

void set_thread_order(unsigned seed) { thread_order = seed; }

}  // namespace emu
