// Runs the threads of a block as fibers of one CPU thread: each has a stack of its own and runs until it has to wait.
//
// A barrier waits for every thread of the block, a warp's operation for its 32 lanes. The sanitizers are told of every switch:
// ThreadSanitizer takes each fiber for a thread, ordered with others by __syncthreads alone, so that a barrier that is not there is
// a race that it reports, on every run. A wait that cannot end is an error too.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define ZSL_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define ZSL_UNSEEN
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int warp_size = 32;

// Copies that wait for their group to be waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

#if defined(__x86_64__)
// Saves what a call preserves on the stack, and goes on from another stack.
extern "C" void zsl_simt_switch(void** from, void* to);
asm(R"(
.text
.type zsl_simt_switch,@function
zsl_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size zsl_simt_switch,.-zsl_simt_switch
)");
#endif

struct Fiber {
#if defined(__x86_64__)
  void* at = nullptr;
#else
  ucontext_t at;
#endif
  void* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan = nullptr;
  void* tsan = nullptr;
  bool done = true;
  Index thread;
  std::vector<Copy> copies;
  int group = 0;
};

class Block;
inline Block* block = nullptr;

class Block {
 public:
  // One block at a time; the fibers are made once and used again.
  static Block& of(int threads) {
    static std::vector<Block*> all(1025, nullptr);
    if (!all.at(static_cast<size_t>(threads))) all[static_cast<size_t>(threads)] = new Block(threads);
    return *all[static_cast<size_t>(threads)];
  }

  void run(const std::function<void()>& body, Index index, Index grid_size, size_t shared_bytes) {
    // Of the exact size, so that the address sanitizer sees its end, and holding NaN.
    if (posix_memalign(reinterpret_cast<void**>(&shared), 1024, shared_bytes ? shared_bytes : 1)) fail("no shared memory");
    std::memset(shared, 0xff, shared_bytes);
    body_ = &body, at = index, grid = grid_size, block = this;
    prepare();
    release(&begins_);
    to(host_, 0);
    acquire(&ends_);
    std::free(shared);
  }

  Fiber& self() { return fibers_[static_cast<size_t>(current_)]; }

  void barrier() {
    release(&barriers_);
    wait();
    acquire(&barriers_);
  }

  // The threads of a warp, or of several, meet: the last one runs `together` with what all of them brought.
  template <int Threads = warp_size, class T, class F>
  ZSL_UNSEEN void meet(T* mine, F together) {
    // Warps and groups of several meet in places of their own: a warp may meet while others of its group wait for it.
    const size_t thread = static_cast<size_t>(current_), own = Threads == warp_size ? 0 : fibers_.size();
    const size_t place = own / warp_size + thread / Threads;
    brought_[own + thread] = mine;
    const int64_t before = meetings_[place];
    idle_ = 0;
    if (++arrived_[place] == Threads) {
      arrived_[place] = 0, ++meetings_[place];
      together(reinterpret_cast<T**>(&brought_[own + thread / Threads * Threads]));
    } else {
      while (meetings_[place] == before) yield();
    }
  }

  // To the next thread that is not done. A wait that goes round twice without progress cannot end.
  ZSL_UNSEEN void yield() {
    const int count = static_cast<int>(fibers_.size());
    if (++idle_ > 2 * count) fail("a barrier or a warp's operation that not every thread reaches");
    int next = current_;
    do next = next + 1 == count ? 0 : next + 1;
    while (fibers_[static_cast<size_t>(next)].done);
    if (next != current_) to(self(), next);
  }
  ZSL_UNSEEN void progress() { idle_ = 0; }

  unsigned char* shared = nullptr;
  Index at, grid;

 private:
  explicit Block(int threads)
      : fibers_(static_cast<size_t>(threads)),
        brought_(2 * fibers_.size()),
        arrived_(2 * (fibers_.size() / warp_size) + 1),
        meetings_(arrived_.size()) {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.thread.x = static_cast<unsigned>(i);
      fiber.stack_bytes = 256 << 10;
      fiber.stack = mmap(nullptr, fiber.stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (fiber.stack == MAP_FAILED) fail("no memory for a stack");
#if defined(__x86_64__)
      void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.stack_bytes) - 2;
      *top = reinterpret_cast<void*>(&Block::enter);  // what the first switch returns to, below six registers
      fiber.at = top - 6;
#else
      getcontext(&fiber.at);
      fiber.at.uc_stack.ss_sp = fiber.stack, fiber.at.uc_stack.ss_size = fiber.stack_bytes;
      makecontext(&fiber.at, &Block::enter, 0);
#endif
#if defined(__SANITIZE_THREAD__)
      fiber.tsan = __tsan_create_fiber(0);
#endif
    }
  }

  ZSL_UNSEEN void prepare() {
    idle_ = waiting_ = 0, left_ = static_cast<int>(fibers_.size());
    for (auto& lanes : arrived_) lanes = 0;
    for (Fiber& fiber : fibers_) fiber.done = false, fiber.copies.clear(), fiber.group = 0;
  }

  ZSL_UNSEEN void wait() {
    const int64_t mine = barriers_;
    idle_ = 0;
    if (++waiting_ == static_cast<int>(fibers_.size()))
      waiting_ = 0, ++barriers_;
    else
      while (barriers_ == mine) yield();
  }

  ZSL_UNSEEN static void enter() {
    block->arrive(nullptr);
    for (;;) {
      block->acquire(&block->begins_);
      (*block->body_)();
      block->release(&block->ends_);
      block->finish();
    }
  }

  ZSL_UNSEEN void finish() {
    self().done = true;
    idle_ = 0;
    if (--left_ == 0)
      to_host();
    else
      yield();
  }

  ZSL_UNSEEN void to(Fiber& from, int next) {
    current_ = next;
    change(from, fibers_[static_cast<size_t>(next)]);
  }
  ZSL_UNSEEN void to_host() { change(self(), host_); }

  ZSL_UNSEEN void change(Fiber& from, Fiber& next) {
#if defined(__SANITIZE_THREAD__)
    if (&from == &host_) host_.tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(next.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.asan, next.stack, next.stack_bytes);
#endif
#if defined(__x86_64__)
    zsl_simt_switch(&from.at, next.at);
#else
    swapcontext(&from.at, &next.at);
#endif
    arrive(from.asan);
  }

  ZSL_UNSEEN void arrive([[maybe_unused]] void* asan) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(asan, &stack, &bytes);
    if (!host_.stack) host_.stack = const_cast<void*>(stack), host_.stack_bytes = bytes;  // the first is left by the host
#endif
  }

  // What came before a release, by any thread, comes before what follows an acquire of the same. Beginning and end are not the
  // barriers': a thread that has ended is not ordered before one that begins after it.
  void release([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(what);
#endif
  }
  void acquire([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(what);
#endif
  }

  std::vector<Fiber> fibers_;
  Fiber host_;
  const std::function<void()>* body_ = nullptr;
  std::vector<void*> brought_;
  std::vector<int> arrived_;
  std::vector<int64_t> meetings_;
  int64_t barriers_ = 0;
  char begins_ = 0, ends_ = 0;  // what the host and the threads are ordered by
  int current_ = 0, waiting_ = 0, left_ = 0, idle_ = 0;
};

}  // namespace simt
