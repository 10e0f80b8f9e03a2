// The persistent GEMM of sm_90a. One warp loads with TMA. Two warp groups take turns with WGMMA.
#pragma once

#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "../tiles.h"
#include "../warp.h"

namespace llave {

template <class Element, Size size, template <class, class, class> class Epilogue>
struct Gemm90 {
  using Tile = llave::Tile<90, Element, size>;
  using Collective = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      Epilogue<Warp, Element, Tile>>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,  //
      Element, cutlass::layout::RowMajor, kAlignment,       // queries
      Element, cutlass::layout::ColumnMajor, kAlignment,    // targets, transposed
      float, typename Tile::Shape, typename Tile::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Collective::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  static_assert(cute::is_same_v<typename Mainloop::TiledMma, typename Tile::Mma>);

  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Collective>;
  using Cluster = typename Tile::Cluster;

  static typename Kernel::TileSchedulerArguments schedule() {
    typename Kernel::TileSchedulerArguments arguments;
    arguments.max_swizzle_size = 8;  // neighbouring tiles run together and share L2
    return arguments;
  }
};

}  // namespace llave
