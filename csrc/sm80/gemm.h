// The GEMM of sm_80 and later, with cp.async loads, mma.sync and one tile per block.
//
// It uses CuTe, not CUTLASS 2.x. CuTe's kernel passes the accumulators to the epilogue in the same
// form as the sm_90 kernel. So one epilogue serves both.
#pragma once

#include "cutlass/gemm/collective/collective_mma.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/numeric_conversion.h"

#include "../tiles.h"
#include "../warp.h"

namespace llave {

// Rounds float32 to the nearest TF32. mma.sync itself would cut off the low bits.
struct RoundToTf32 {
  CUTE_DEVICE cutlass::tfloat32_t operator()(cutlass::tfloat32_t x) const {
    return cutlass::NumericConverter<cutlass::tfloat32_t, float>()(
        reinterpret_cast<float const&>(x));
  }
};

template <class Element, Size size, template <class, class, class> class Epilogue>
struct Gemm80 {
  using Tile = llave::Tile<80, Element, size>;
  using Collective = Epilogue<Warp, Element, Tile>;
  using Value = Operand<Element>;
  using Stride = cute::Stride<int64_t, cute::Int<1>, int64_t>;
  // 256 threads copy 16 bytes each. Eight threads copy a row of 128 bytes.
  static constexpr int kVector = 16 / sizeof(Element);
  using GlobalCopy = decltype(cute::make_tiled_copy(
      cute::Copy_Atom<cute::SM80_CP_ASYNC_CACHEALWAYS<cute::uint128_t>, Value>{},
      cute::Layout<cute::Shape<cute::_32, cute::_8>, cute::Stride<cute::_8, cute::_1>>{},
      cute::Layout<cute::Shape<cute::_1, cute::Int<kVector>>>{}));
  // Rows have 128 bytes. Their 16-byte parts are swizzled, so that ldmatrix has no bank conflicts.
  static constexpr int kBase = sizeof(Element) == 4 ? 2 : 3;
  using SharedLayout = decltype(cute::composition(
      cute::Swizzle<3, kBase, 3>{}, cute::Layout<cute::Shape<cute::_8, Depth<Element>>,
                                                 cute::Stride<Depth<Element>, cute::_1>>{}));
  using SharedCopy = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Value>;
  using Round = cute::conditional_t<cute::is_same_v<Element, float>, RoundToTf32, cute::identity>;
  using Mainloop = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm80CpAsync<Tile::kStages>, typename Tile::Shape, Value, Stride, Value,
      Stride, typename Tile::Mma, GlobalCopy, SharedLayout, SharedCopy, Round, GlobalCopy,
      SharedLayout, SharedCopy, Round>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Collective>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;

  static typename Kernel::TileSchedulerArguments schedule() { return {}; }
};

}  // namespace llave
