// stackful coroutines for one OS thread. swapcontext saves the signal mask with two system calls,
// which would dominate the emulator, so x86-64 switches by hand.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

// pages are committed when they are touched, so a generous size costs nothing
constexpr size_t kStackBytes = size_t(256) << 10;

#if defined(__x86_64__)
using Context = void*;

// saves the callee-saved registers and the stack pointer in *from, and continues at `to`
__attribute__((naked, noinline)) inline void switch_context(Context* from, Context to) {
  (void)from, (void)to;
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline Context prepare_context(char* stack, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t(15);
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // return address of entry, which never returns; aligns the stack as a call
  *--frame = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  return frame;
}
#else
using Context = ucontext_t*;

inline void switch_context(Context* from, Context to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, to);
}

inline Context prepare_context(char* stack, void (*entry)()) {
  auto* context = new (stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

// the i-th stack, mapped once and kept for every later block
inline char* fiber_stack(size_t i) {
  static std::vector<char*> pool;
  while (pool.size() <= i) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    pool.push_back(static_cast<char*>(memory));
  }
  return pool[i];
}

}  // namespace cuda_host
