// A simulated block of threads. Each thread is a fiber that runs until it waits for others.
//
// `SimulatedWarp` replaces `Warp` of csrc/warp.h. It does not show what `Warp` compiles to.
// tests/csrc/test_extension.py reads the machine code for that.
// The simulation checks two things that a GPU would not report: all lanes of a warp meet in the
// same operation, and no thread waits for ever.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace llave {

class Block {
 public:
  static void run(int threads, std::function<void(int)> body) {
    Block block(threads, std::move(body));
    current_ = &block;
    block.loop();
    if (!block.error_.empty()) throw std::runtime_error(block.error_);
  }

  static Block& current() { return *current_; }
  int thread() const { return running_; }

  // The value that thread `from` of the same warp passed to this operation.
  uint64_t exchange(uint64_t mine, int kind, int from) {
    Group& warp = warps_[running_ / 32];
    const int turn = warp.generation % 2;
    slots_[turn][running_] = {mine, kind};
    meet(warp, 32);
    if (slots_[turn][from].kind != kind) error_ = "lanes of a warp met in different operations";
    return slots_[turn][from].value;
  }

  void meet_all(int threads) { meet(everyone_, threads); }

 private:
  struct Group {
    int waiting = 0, generation = 0;
  };
  struct Slot {
    uint64_t value;
    int kind;
  };
  struct Fiber {
    ucontext_t start;
    jmp_buf place;  // where it waits. _setjmp saves no signal mask, which would be a system call
    bool started = false, done = false;
  };
  static constexpr size_t kStack = 256 << 10;

  Block(int threads, std::function<void(int)> body)
      : body_(std::move(body)), fibers_(threads), warps_(threads / 32) {
    for (auto& slots : slots_) slots.resize(threads);
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = stack(&fiber - fibers_.data());
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Block::enter, 0);
    }
  }

  // Blocks reuse the stacks. Fresh memory would cost more time than running the threads.
  static char* stack(size_t thread) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= thread) stacks.emplace_back(new char[kStack]);
    return stacks[thread].get();
  }

  static void enter() {
    Block& block = *current_;
    block.body_(block.running_);
    block.fibers_[block.running_].done = true;
    ++block.progress_;
    _longjmp(block.home_, 1);
  }

  void resume(Fiber& fiber) {
    if (_setjmp(home_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  void pause() {
    if (_setjmp(fibers_[running_].place) == 0) _longjmp(home_, 1);
  }

  void loop() {
    for (bool any = true; any;) {
      any = false;
      const int64_t before = progress_;
      for (running_ = 0; running_ < static_cast<int>(fibers_.size()); ++running_) {
        if (fibers_[running_].done) continue;
        any = true;
        resume(fibers_[running_]);
      }
      if (any && progress_ == before) {
        error_ = "threads wait for others that never come";
        return;
      }
    }
  }

  void meet(Group& group, int size) {
    const int generation = group.generation;
    if (++group.waiting == size) {
      group.waiting = 0;
      ++group.generation;
      ++progress_;
      return;
    }
    while (group.generation == generation) pause();
  }

  static inline Block* current_ = nullptr;
  std::function<void(int)> body_;
  std::vector<Fiber> fibers_;
  std::vector<Group> warps_;
  Group everyone_;
  std::vector<Slot> slots_[2];
  jmp_buf home_;
  int running_ = 0;
  int64_t progress_ = 0;
  std::string error_;
};

struct SimulatedWarp {
  template <class Value>
  static Value shuffle_xor(Value x, int mask) {
    static_assert(sizeof(Value) == 4);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    Block& block = Block::current();
    bits = static_cast<uint32_t>(block.exchange(bits, mask, block.thread() ^ mask));
    std::memcpy(&x, &bits, 4);
    return x;
  }

  static bool any(bool x) {
    Block& block = Block::current();
    bool found = x;
    for (int mask = 1; mask < 32; mask *= 2) {
      found |= block.exchange(found, 100 + mask, block.thread() ^ mask) != 0;
    }
    return found;
  }

  static int opaque(int x) { return x; }

  static void fence() {}

  static void synchronize(int threads) { Block::current().meet_all(threads); }
};

}  // namespace llave
