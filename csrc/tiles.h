// The table of tiles: shape, cluster or stages, and tensor-core instruction.
#pragma once

#include "cute/atom/mma_atom.hpp"
#include "cute/atom/mma_traits_sm80.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"
#include "cutlass/numeric_types.h"

#include "sizes.h"

namespace llave {

// The type that the tensor cores read. float32 inputs are multiplied as TF32.
template <class Element>
using Operand = cute::conditional_t<cute::is_same_v<Element, float>, cutlass::tfloat32_t, Element>;

// Elements of D in a row of a tile. They take 128 bytes.
template <class Element>
using Depth = cute::Int<128 / sizeof(Element)>;

template <int Architecture, class Element, Size size>
struct Tile;

template <class Element, Size size>
struct TileBase {
  static constexpr int kRows = tile_rows(size), kColumns = tile_columns(size);
  using Shape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, Depth<Element>>;
};

// The largest tiles whose accumulators leave the epilogue enough registers.
template <int Architecture>
constexpr Size kLargestForward = Architecture == 90 ? Size::wide : Size::large;
template <int Architecture, class Element>
constexpr Size kLargestBackward = Architecture != 90     ? Size::large
                                  : sizeof(Element) == 4 ? Size::wide
                                                         : Size::widest;

// The tile of the backward that reads similarities from memory and multiplies nothing, whatever the
// architecture. Two blocks of it fit a multiprocessor.
template <class Element>
using KeptTile = Tile<80, Element, Size::small>;

// Two groups of four warps take turns. While one multiplies its tile, the other reduces its own. A
// thread holds 64 to 192 accumulators in its 232 registers.
template <class Element, Size size>
struct Tile<90, Element, size> : TileBase<Element, size> {
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two tiles share their targets
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Operand<Element>, Operand<Element>, float,
                                 typename TileBase<Element, size>::Shape>(),
      cute::Layout<cute::Shape<cute::_1, cute::_1, cute::_1>>{}));
};

template <class Element>
struct Instruction80;
template <>
struct Instruction80<cutlass::bfloat16_t> {
  using Operation = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};
template <>
struct Instruction80<cutlass::half_t> {
  using Operation = cute::SM80_16x8x16_F32F16F16F32_TN;
};
template <>
struct Instruction80<float> {
  using Operation = cute::SM80_16x8x8_F32TF32TF32F32_TN;
};

// There are eight warps, four down and two across. A thread holds 64 or 32 accumulators. Three
// stages take at most 96 KiB. Every GPU from sm_80 on has that much.
template <class Element, Size size>
struct Tile<80, Element, size> : TileBase<Element, size> {
  static constexpr int kStages = 3;
  using Mma = cute::TiledMMA<cute::MMA_Atom<typename Instruction80<Element>::Operation>,
                             cute::Layout<cute::Shape<cute::_4, cute::_2, cute::_1>>,
                             cute::Tile<cute::_64, cute::_32, cute::Int<32 / sizeof(Element)>>>;
};

}  // namespace llave
