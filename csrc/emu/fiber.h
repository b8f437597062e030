// A computation with its own stack that can be left and entered again: one per emulated CUDA thread.
//
// x86-64 switches with a dozen instructions; other machines use ucontext (about 16 times slower). Address-
// and ThreadSanitizer are told of every switch. Stacks end in a page that faults.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes the fiber begin at `entry`, which must leave for good by yield(true), when it is next resumed.
  void start(void (*entry)());
  // Runs the fiber until it yields. Called by the scheduler, which lives on the host thread's own stack.
  void resume();
  // Back to the scheduler. Called on the fiber.
  void yield(bool for_good = false);
  // First thing `entry` does.
  void entered();
  // Gives up a fiber that has not finished, with a release(tag) in its name.
  void abandon(void* tag);
  // Forgets a finished or abandoned fiber; start() makes it fresh, unordered with its earlier life.
  void retire();

 private:
  void create_stack();
  void destroy_stack();

  char* stack_ = nullptr;
#if defined(__x86_64__)
  void* sp_ = nullptr;
  void* scheduler_sp_ = nullptr;
#else
  ucontext_t context_, scheduler_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
  void* tsan_ = nullptr;  // ThreadSanitizer's
  void* previous_tsan_ = nullptr;
  void* scheduler_tsan_ = nullptr;
};

// Tells ThreadSanitizer that what happened before release(tag) happens before what follows acquire(tag).
void release(void* tag);
void acquire(void* tag);

}  // namespace emu
