// The warp operations that the epilogues use. Tests replace them with a simulation.
#pragma once

#include "cutlass/arch/barrier.h"

namespace llave {

struct Warp {
  template <class Value>
  CUTE_DEVICE static Value shuffle_xor(Value x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  CUTE_DEVICE static bool any(bool x) { return __any_sync(0xffffffffu, x); }

  // The same value, in a form that tells the compiler nothing. What depends on it is computed anew.
  // Otherwise it would be computed much earlier, and hold registers from there on.
  CUTE_DEVICE static int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }

  // Shared memory is read anew after this. Otherwise the compiler keeps what it has read, and that
  // is more than there are registers.
  CUTE_DEVICE static void fence() { __syncwarp(); }

  // Waits for all `threads` that share a tile. This is the plain instruction. CUTLASS's function
  // for it is a trap below sm_90.
  CUTE_DEVICE static void synchronize(int threads) {
    constexpr int barrier = static_cast<int>(cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
    asm volatile("bar.sync %0, %1;" ::"n"(barrier), "r"(threads) : "memory");
  }
};

}  // namespace llave
