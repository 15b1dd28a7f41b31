// Cooperative threads of execution on one operating-system thread, known to AddressSanitizer and ThreadSanitizer.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#ifndef __x86_64__
#define EMULATOR_UCONTEXT
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) && !defined(EMULATOR_TRAFFIC)  // for the latter see traffic.h
#define EMULATOR_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace slowfast_ext::emulator {

#ifdef EMULATOR_THREAD_SANITIZER
// What the emulator itself does on behalf of several CUDA threads is no access of theirs: no race in this scope counts.
struct Unobserved {
  Unobserved() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unobserved() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  Unobserved(const Unobserved&) = delete;
};
#define EMULATOR_UNOBSERVED __attribute__((no_sanitize("thread")))
inline void happens_before(void* tag) { __tsan_release(tag); }
inline void happens_after(void* tag) { __tsan_acquire(tag); }
#else
struct Unobserved {
  Unobserved() {}
};
#ifdef __SANITIZE_THREAD__
#define EMULATOR_UNOBSERVED __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_UNOBSERVED
#endif
inline void happens_before(void*) {}
inline void happens_after(void*) {}
#endif

#ifndef EMULATOR_UCONTEXT
// Save the callee-saved registers and the stack pointer of this fiber, load those of another one and return there.
// Floating point control words are never changed by kernels and stay. ucontext does the same at 10 times the cost (a
// system call).
__attribute__((naked, noinline)) EMULATOR_UNOBSERVED inline void switch_stack(void** /*saved*/, void* /*next*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

// A default-constructed fiber stands for the operating-system thread that constructs it.
class Fiber {
 public:
  Fiber() {
#ifdef EMULATOR_THREAD_SANITIZER
    context_ = __tsan_get_current_fiber();
#endif
  }

  Fiber(const Fiber&) = delete;

  ~Fiber() {
#ifdef EMULATOR_THREAD_SANITIZER
    if (owns_context_) __tsan_destroy_fiber(context_);
#endif
  }

  // At the first switch to it, run `entry` on this stack: it must first call arrived() and must never return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    bottom_ = stack, bytes_ = bytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, bytes);
#endif
#ifdef EMULATOR_THREAD_SANITIZER
    context_ = __tsan_create_fiber(0), owns_context_ = true;
#endif
#ifdef EMULATOR_UCONTEXT
    getcontext(&saved_);
    saved_.uc_stack.ss_sp = stack, saved_.uc_stack.ss_size = bytes, saved_.uc_link = nullptr;
    makecontext(&saved_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(stack + bytes);  // 16-byte aligned
    top[-1] = nullptr;                                     // where `entry` would return to: ends every backtrace
    top[-2] = reinterpret_cast<void*>(entry);
    std::fill(top - 8, top - 2, nullptr);
    saved_ = top - 8;
#endif
  }

  // Leave this fiber, which must be the running one, until someone switches back to it.
  __attribute__((noinline)) EMULATOR_UNOBSERVED void switch_to(Fiber& next) {
    leaving() = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
#ifdef EMULATOR_THREAD_SANITIZER
    __tsan_switch_to_fiber(next.context_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_UCONTEXT
    swapcontext(&saved_, &next.saved_);
#else
    switch_stack(&saved_, next.saved_);
#endif
    arrived();
  }

  EMULATOR_UNOBSERVED void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, &leaving()->bottom_, &leaving()->bytes_);
#endif
  }

 private:
  EMULATOR_UNOBSERVED static Fiber*& leaving() {
    static thread_local Fiber* fiber;
    return fiber;
  }

  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
#ifdef EMULATOR_UCONTEXT
  ucontext_t saved_;
#else
  void* saved_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
#endif
#ifdef EMULATOR_THREAD_SANITIZER
  void* context_ = nullptr;
  bool owns_context_ = false;
#endif
};

// Equal stacks in one mapping, each above a page that faults. Consecutive stacks start at different offsets in their
// page: the hot end of all of them would otherwise fall into the same cache sets.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__) || defined(EMULATOR_THREAD_SANITIZER)
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  static constexpr size_t kPage = 4096, kStride = kBytes + 2 * kPage;

  explicit Stacks(unsigned count) : bytes_(count * kStride) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of the CUDA threads");
    for (unsigned i = 0; i < count; ++i) mprotect(static_cast<char*>(memory_) + i * kStride, kPage, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(memory_, bytes_);  // else whoever is given these addresses next is reported
#endif
    munmap(memory_, bytes_);
  }

  char* operator[](unsigned i) const { return static_cast<char*>(memory_) + i * kStride + kPage + i * 320 % kPage; }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace slowfast_ext::emulator
