// What CUTLASS's kernels ask of an epilogue that takes the whole accumulator tile at once.
//
// A softmax needs the largest logit before the first exponential; the visitors of CUTLASS's own
// epilogues see a fragment once and pass on, so ours takes the tile. The kernels of sm_80 call it
// as it is, those of sm_90 through `Sm90TmaWarpSpecializedAdapter`.
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
  Params const& params;  // where the kernel was given them: constant memory, no registers
};

}  // namespace llave
