// Fibers for the CUDA emulation: the threads of a block, run one at a time on the thread that launches it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

// The address sanitizer must know on which stack a thread runs.
class StackSwitch {
  public:
#if defined(__SANITIZE_ADDRESS__)
    void leave(const void* bottom, std::size_t size) {
        __sanitizer_start_switch_fiber(&fake_stack_, bottom, size);
    }
    void arrive(const void** bottom, std::size_t* size) {
        __sanitizer_finish_switch_fiber(fake_stack_, bottom, size);
    }

  private:
    void* fake_stack_ = nullptr;
#else
    void leave(const void*, std::size_t) {}
    void arrive(const void**, std::size_t*) {}
#endif
};

#if defined(__x86_64__)
// Pushes the registers a call must preserve, swaps stacks and pops them again. swapcontext would do, but for
// a system call a switch, and a block of 512 threads switches a million times.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}

class Context {
  public:
    void prepare(void* stack, std::size_t bytes, void (*entry)()) {
        auto top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
        *--top = nullptr;  // entry finds the stack aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
        stack_ = top;
    }
    void switch_to(Context& other) { switch_stacks(&stack_, other.stack_); }

  private:
    void* stack_ = nullptr;
};
#else
class Context {
  public:
    void prepare(void* stack, std::size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

  private:
    ucontext_t context_;
};
#endif

// One stack with a guard page below it. `resume` runs it until it pauses; it is reused by `start`.
class Fiber {
  public:
    static constexpr std::size_t kStackBytes = 64 << 10;

    Fiber() {
        guard_bytes_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        memory_ = mmap(nullptr, guard_bytes_ + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED || mprotect(memory_, guard_bytes_, PROT_NONE) != 0) throw std::bad_alloc();
    }
    ~Fiber() { munmap(memory_, guard_bytes_ + kStackBytes); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next `resume` calls entry(), which must end in `pause` and never return.
    void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(stack(), kStackBytes);  // the last entry never returned
#endif
        context_.prepare(stack(), kStackBytes, entry);
        stack_switch_ = {};
    }

    void resume() {
        StackSwitch host;
        host.leave(stack(), kStackBytes);
        host_.switch_to(context_);
        host.arrive(nullptr, nullptr);
    }

    // Called on the fiber, first of all by its entry.
    void arrive() { stack_switch_.arrive(&host_stack_, &host_stack_bytes_); }

    // Called on the fiber: back to `resume`.
    void pause() {
        stack_switch_.leave(host_stack_, host_stack_bytes_);
        context_.switch_to(host_);
        arrive();
    }

  private:
    void* stack() const { return static_cast<char*>(memory_) + guard_bytes_; }

    void* memory_;
    std::size_t guard_bytes_;
    Context context_;
    Context host_;
    StackSwitch stack_switch_;
    const void* host_stack_ = nullptr;
    std::size_t host_stack_bytes_ = 0;
};

}  // namespace emulation
