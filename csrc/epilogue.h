// What CUTLASS's kernels require of an epilogue. Ours takes the whole accumulator tile at once.
//
// A softmax needs the largest logit before the first exponential. The visitors of CUTLASS's own
// epilogues see each fragment only once. The sm_80 kernels call our epilogue directly. The sm_90
// kernels call it through `Sm90TmaWarpSpecializedAdapter`.
#pragma once

#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"

#include "problem.h"

namespace llave {

template <class Outputs>
class EpilogueInterface {
 public:
  using ElementAccumulator = float;
  using ElementC = void;  // no source
  using ElementD = void;  // no product is stored
  using StrideC = cute::Stride<int64_t, cute::Int<1>, int64_t>;
  using StrideD = StrideC;

  struct Arguments {
    Problem problem;
    Outputs outputs;
  };
  using Params = Arguments;

  template <class Shape>
  static Params to_underlying_arguments(Shape const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) {
    return 0;
  }

  CUTE_HOST_DEVICE explicit EpilogueInterface(Params const& p) : params(p) {}

 protected:
  Params const& params;  // they stay in the kernel's constant memory and take no registers
};

}  // namespace llave
