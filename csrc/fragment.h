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
      : first_row(cute::get<0>(coordinates(thread)(0, 0))),
        first_column(cute::get<1>(coordinates(thread)(0, 0))),
        lane(thread % 32),
        warp_down(thread / 32 % kWarpsDown),
        warp_across(thread / 32 / kWarpsDown) {}

  template <class Index>
  CUTE_HOST_DEVICE int row(Index r) const {
    return first_row + row_offset(r);
  }
  template <class Index>
  CUTE_HOST_DEVICE int column(Index c) const {
    return first_column + column_offset(c);
  }

  // A thread's rows and columns.
  static constexpr int kRowsHeld = decltype(cute::size<0>(decltype(coordinates(0)){}))::value;
  static constexpr int kColumnsHeld = decltype(cute::size<1>(decltype(coordinates(0)){}))::value;

  // Offsets from the thread's first row and column. They are the same for every thread, so the
  // compiler knows them.
  template <class Index>
  CUTE_HOST_DEVICE static int row_offset(Index r) {
    return cute::get<0>(decltype(coordinates(0)){}.layout()(r, 0));
  }
  template <class Index>
  CUTE_HOST_DEVICE static int column_offset(Index c) {
    return cute::get<1>(decltype(coordinates(0)){}.layout()(0, c));
  }

  int first_row, first_column, lane, warp_down, warp_across;
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

template <class Warp>
CUTE_DEVICE float warp_sum(float x) {
  x = quad_sum<Warp>(x);
  x += Warp::shuffle_xor(x, 4);
  x += Warp::shuffle_xor(x, 8);
  return x + Warp::shuffle_xor(x, 16);
}

// Of two columns, lanes without the bit `mask` keep the first and the others keep the second. Adds
// what the partner has of it.
template <class Warp>
CUTE_DEVICE float halve(float first, float second, int lane, int mask) {
  const bool upper = lane & mask;
  return (upper ? second : first) + Warp::shuffle_xor(upper ? first : second, mask);
}

// Sums 8 columns over the 8 lanes that hold them. A lane keeps the sum of column `lane / 4`. That
// takes 7 shuffles, where separate sums take 24. `column(k)` gives the lane's part of column k. Few
// parts wait for others in registers.
template <class Warp, class Column>
CUTE_DEVICE float scattered_sum(int lane, Column column) {
  const auto pair = [&](int k) {
    const float first = column(k);
    return halve<Warp>(first, column(k + 4), lane, 16);
  };
  const auto four = [&](int k) {
    const float first = pair(k);
    return halve<Warp>(first, pair(k + 2), lane, 8);
  };
  const float first = four(0);
  return halve<Warp>(first, four(1), lane, 4);
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
