// One thread's accumulators as a small matrix, and warp reductions along its rows and columns.
//
// The tensor-core instructions of sm_80 and sm_90 place accumulators alike. The 4 lanes of a quad
// hold different columns of the same rows. The 8 lanes with the same place in their quad hold
// different rows of the same columns.
#pragma once

#include "cute/tensor.hpp"

#include "softmax.h"

namespace llave {

// Turns a layout ((2 columns, 2 rows[, blocks of columns]), MMA_M, MMA_N) into (rows, columns).
template <class Layout>
CUTE_HOST_DEVICE constexpr auto matrix_layout(Layout const& layout) {
  using namespace cute;
  if constexpr (rank_v<decltype(get<0>(layout))> == 3) {
    return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                       make_layout(get<0, 0>(layout), get<0, 2>(layout), get<2>(layout)));
  } else {
    return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                       make_layout(get<0, 0>(layout), get<2>(layout)));
  }
}

// Where a thread's matrix lies in the tile.
template <class Tile>
struct Place {
  using TiledMma = typename Tile::Mma;
  static constexpr int kThreads = decltype(cute::size(TiledMma{}))::value;
  static constexpr int kWarpsAcross = decltype(cute::size<2>(
      typename TiledMma::ThrLayoutVMNK{}))::value;  // warps side by side along the columns
  static constexpr int kWarpsDown = kThreads / 32 / kWarpsAcross;

  CUTE_HOST_DEVICE static auto coordinates(int thread) {
    using namespace cute;
    auto tile = make_identity_tensor(select<0, 1>(typename Tile::Shape{}));
    auto part = TiledMma{}.get_thread_slice(thread).partition_C(tile);
    return make_tensor(part.data(), matrix_layout(part.layout()));
  }

  CUTE_HOST_DEVICE explicit Place(int thread)
      : crd(coordinates(thread)),
        lane(thread % 32),
        warp_down(thread / 32 % kWarpsDown),
        warp_across(thread / 32 / kWarpsDown) {}

  template <class Index>
  CUTE_HOST_DEVICE int row(Index r) const {
    return cute::get<0>(crd(r, 0));
  }
  template <class Index>
  CUTE_HOST_DEVICE int column(Index c) const {
    return cute::get<1>(crd(0, c));
  }

  // `column(c) - column(0)`. It is the same for every thread, so the compiler knows it.
  template <class Index>
  CUTE_HOST_DEVICE static int column_offset(Index c) {
    return cute::get<1>(decltype(coordinates(0)){}.layout()(0, c));
  }

  decltype(coordinates(0)) crd;
  int lane, warp_down, warp_across;
};

template <class Warp>
CUTE_DEVICE float quad_sum(float x) {
  x += Warp::shuffle_xor(x, 1);
  return x + Warp::shuffle_xor(x, 2);
}

template <class Warp>
CUTE_DEVICE float quad_max(float x) {
  x = fmaxf(x, Warp::shuffle_xor(x, 1));
  return fmaxf(x, Warp::shuffle_xor(x, 2));
}

// The maximum over the 8 lanes that hold the same columns.
template <class Warp>
CUTE_DEVICE float column_max(float x) {
  x = fmaxf(x, Warp::shuffle_xor(x, 4));
  x = fmaxf(x, Warp::shuffle_xor(x, 8));
  return fmaxf(x, Warp::shuffle_xor(x, 16));
}

template <class Warp>
CUTE_DEVICE float warp_max(float x) {
  return column_max<Warp>(quad_max<Warp>(x));
}

// Sums 8 columns over the 8 lanes that hold them. A lane keeps the sum of column `lane / 4`. Each
// step halves the number of columns per lane. That takes 7 shuffles, where separate sums take 24.
template <class Warp>
CUTE_DEVICE float scattered_sum(const float (&x)[8], int lane) {
  float four[4], two[2];
  CUTE_UNROLL
  for (int k = 0; k < 4; ++k) {
    const bool upper = lane & 16;
    const float kept = upper ? x[k + 4] : x[k];
    four[k] = kept + Warp::shuffle_xor(upper ? x[k] : x[k + 4], 16);
  }
  CUTE_UNROLL
  for (int k = 0; k < 2; ++k) {
    const bool upper = lane & 8;
    const float kept = upper ? four[k + 2] : four[k];
    two[k] = kept + Warp::shuffle_xor(upper ? four[k] : four[k + 2], 8);
  }
  const bool upper = lane & 4;
  const float kept = upper ? two[1] : two[0];
  return kept + Warp::shuffle_xor(upper ? two[0] : two[1], 4);
}

// Transposes 4 x 4 words over a quad. Word j of lane q becomes word q of lane j.
template <class Warp>
CUTE_DEVICE void transpose_quad(uint32_t (&words)[4], int lane) {
  CUTE_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool odd = lane & bit;
    CUTE_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k & bit) continue;
      const uint32_t received = Warp::shuffle_xor(odd ? words[k] : words[k + bit], bit);
      (odd ? words[k] : words[k + bit]) = received;
    }
  }
}

}  // namespace llave
