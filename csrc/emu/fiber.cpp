#include "emu/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(TK_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TK_EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emu {
namespace {

#if defined(TK_EMU_ASAN) || defined(TK_EMU_TSAN)
constexpr size_t stack_bytes = 256 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif
constexpr size_t guard_bytes = 4096;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and continues on the other stack.
extern "C" void tk_emu_switch(void** save, void* to);
__asm__(
    ".text\n"
    ".type tk_emu_switch,@function\n"
    "tk_emu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp,(%rdi)\n"
    "  movq %rsi,%rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size tk_emu_switch,.-tk_emu_switch\n");
constexpr int saved_registers = 6;
#endif

}  // namespace

Fiber::~Fiber() {
  retire();
  destroy_stack();
}

void Fiber::destroy_stack() {
  if (stack_) munmap(stack_ - guard_bytes, stack_bytes + guard_bytes);
  stack_ = nullptr;
}

void Fiber::create_stack() {
  void* memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) {
    std::perror("emu: no memory for the stack of a thread");
    std::abort();
  }
  stack_ = static_cast<char*>(memory) + guard_bytes;
}

void Fiber::start(void (*entry)()) {
  if (!stack_) create_stack();
#if defined(__x86_64__)
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_) + stack_bytes) & ~uintptr_t{15});
  *--top = nullptr;  // the return address of `entry`: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < saved_registers; ++i) *--top = nullptr;
  sp_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
  fake_stack_ = nullptr;
#if defined(TK_EMU_TSAN)
  tsan_ = __tsan_create_fiber(0);
#endif
}

void Fiber::retire() {
#if defined(TK_EMU_TSAN)
  if (!tsan_) return;
  // Destroyed one life later: a new fiber with the same number would pass for the same thread.
  if (previous_tsan_) __tsan_destroy_fiber(previous_tsan_);
  previous_tsan_ = tsan_;
  tsan_ = nullptr;
  destroy_stack();  // the next fiber is unordered with this one: the same stack would look like a race
#endif
}

void Fiber::abandon([[maybe_unused]] void* tag) {
#if defined(TK_EMU_ASAN)
  if (stack_) __asan_unpoison_memory_region(stack_, stack_bytes);  // frames that never returned
#endif
#if defined(TK_EMU_TSAN)
  void* scheduler = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, 1);
  release(tag);
  __tsan_switch_to_fiber(scheduler, 1);
#endif
}

void Fiber::resume() {
#if defined(TK_EMU_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stack_, stack_bytes);
#endif
#if defined(TK_EMU_TSAN)
  scheduler_tsan_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, 1);  // 1: a switch orders nothing
#endif
#if defined(__x86_64__)
  tk_emu_switch(&scheduler_sp_, sp_);
#else
  swapcontext(&scheduler_, &context_);
#endif
#if defined(TK_EMU_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(TK_EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

void Fiber::yield([[maybe_unused]] bool for_good) {
#if defined(TK_EMU_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack_, scheduler_stack_size_);
#endif
#if defined(TK_EMU_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan_, 1);
#endif
#if defined(__x86_64__)
  tk_emu_switch(&sp_, scheduler_sp_);
#else
  swapcontext(&context_, &scheduler_);
#endif
#if defined(TK_EMU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

void release([[maybe_unused]] void* tag) {
#if defined(TK_EMU_TSAN)
  __tsan_release(tag);
#endif
}

void acquire([[maybe_unused]] void* tag) {
#if defined(TK_EMU_TSAN)
  __tsan_acquire(tag);
#endif
}

}  // namespace emu
