// What the epilogues ask of the threads around them. Tests put a simulation in its place.
#pragma once

#include "cutlass/arch/barrier.h"

namespace llave {

struct Warp {
  template <class Value>
  CUTE_DEVICE static Value shuffle_xor(Value x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  CUTE_DEVICE static bool any(bool x) { return __any_sync(0xffffffffu, x); }

  // Waits for all `threads` that share a tile.
  CUTE_DEVICE static void synchronize(int threads) {
    cutlass::arch::NamedBarrier::sync(threads,
                                      cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
  }
};

}  // namespace llave
