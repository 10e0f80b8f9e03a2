// The rules of a tile's pairs. The threads of a tile load once, into shared memory, what the rules
// read of its rows and columns. A thread that held this for its columns would have no registers
// left.
#pragma once

#include "fragment.h"
#include "pairs.h"
#include "sizes.h"

namespace llave {

template <class Warp, class Tile>
struct TilePairs {
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  // Larger tiles have neither the registers nor the shared memory for biases. They take no such
  // calls.
  static constexpr bool kTakesBiases = kColumns <= tile_columns(Size::large);
  static constexpr int kThreads = Place<Tile>::kThreads, kWarps = kThreads / 32;

  int64_t row_ids[kRows], column_ids[kColumns];
  float row_limits[kRows], column_limits[kColumns];
  float row_biases[kTakesBiases ? kRows : 1], column_biases[kTakesBiases ? kColumns : 1];
  int labels[kRows], owners[kColumns];
  int mined[kWarps];  // whether some column that the warp loaded has another column as its owner

  // All threads of the tile call this, and synchronize before they read.
  CUTE_DEVICE void load(const Problem& p, int i0, int j0, int thread) {
    for (int i = thread; i < kRows; i += kThreads) {
      const Row row = load_row(p, i0 + i);
      labels[i] = row.label;
      row_limits[i] = row.limit;
      if constexpr (kTakesBiases) row_biases[i] = row.bias;
      row_ids[i] = row.id;
    }
    bool found = false;
    for (int j = thread; j < kColumns; j += kThreads) {
      const Column column = load_column(p, j0 + j);
      owners[j] = column.owner;
      column_limits[j] = column.limit;
      if constexpr (kTakesBiases) column_biases[j] = column.bias;
      column_ids[j] = column.id;
      found |= column.owner != j0 + j;
    }
    found = Warp::any(found);
    if (thread % 32 == 0) mined[thread / 32] = found;
  }

  // A value of a row, or of a column, with its bias. A row's bias is the same for its whole sum, so
  // its logits leave that out and combine.h adds it at the end. So it is with a column's.
  CUTE_DEVICE float with_row_bias(float x, int i) const {
    if constexpr (kTakesBiases) x += row_biases[i];
    return x;
  }
  CUTE_DEVICE float with_column_bias(float x, int j) const {
    if constexpr (kTakesBiases) x += column_biases[j];
    return x;
  }

  // A value of a row or column without its bias.
  CUTE_DEVICE float without_row_bias(float x, int i) const {
    if constexpr (kTakesBiases) x -= row_biases[i];
    return x;
  }
  CUTE_DEVICE float without_column_bias(float x, int j) const {
    if constexpr (kTakesBiases) x -= column_biases[j];
    return x;
  }

  // Whether every pair of the warp is plain: it counts in both directions, is not the row's own and
  // has no bias.
  // The edges of the matrix are not looked at. False may be too careful. The similarities are `s`.
  template <class Matrix>
  CUTE_DEVICE bool plain(const Rules& rules, Matrix const& s, Place<Tile> const& place,
                         int j0) const {
    using namespace cute;
    constexpr int R = decltype(size<0>(s))::value, C = decltype(size<1>(s))::value;
    bool bites = kTakesBiases && rules.biased();
    int own[R];
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      own[r] = labels[place.row(r)];
      bites |= own[r] >= j0 && own[r] < j0 + kColumns;
    }
    if (rules.owners != nullptr && any_mined()) {
      CUTE_UNROLL
      for (int c = 0; c < C; ++c) {
        const int owner = owners[place.column(c)];
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) bites |= owner == own[r];
      }
    }
    if (rules.query_ids != nullptr) {
      uint32_t ids[R];
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) ids[r] = folded(row_ids[place.row(r)]);
      CUTE_UNROLL
      for (int c = 0; c < C; ++c) {
        const uint32_t id = folded(column_ids[place.column(c)]);
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) bites |= id == ids[r];
      }
    }
    if (rules.row_limit != nullptr) {
      float highest[R];
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) highest[r] = -kInfinity;
      CUTE_UNROLL
      for (int c = 0; c < C; ++c) {
        float column = -kInfinity;
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          highest[r] = fmaxf(highest[r], s(r, c));
          column = fmaxf(column, s(r, c));
        }
        bites |= column > column_limits[place.column(c)];
      }
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) bites |= highest[r] > row_limits[place.row(r)];
    }
    return !Warp::any(bites);
  }

  // The offset of a row's positive from the thread's first column. As an offset, the columns to
  // compare it with are constants and take no registers.
  CUTE_DEVICE int positive_offset(Place<Tile> const& place, int j0, int i) const {
    return labels[i] - j0 - place.column(0);
  }

  // Replaces similarities of pairs that count in neither direction by -infinity.
  template <class Matrix>
  CUTE_DEVICE void exclude(const Problem& p, Matrix& s, Place<Tile> const& place, int i0,
                           int j0) const {
    replace(s, [&](int r, int c) {
      return positive_offset(place, j0, place.row(r)) == place.column_offset(c);
    });
    if (p.rules.query_ids != nullptr) {
      replace(s,
              [&](int r, int c) { return row_ids[place.row(r)] == column_ids[place.column(c)]; });
    }
    if (p.rules.hardness == Hardness::within && p.rules.owners != nullptr) {
      replace(s, [&](int r, int c) { return labels[place.row(r)] == owners[place.column(c)]; });
    }
    if (i0 + kRows > p.n || j0 + kColumns > p.m) {
      const int rows = p.n - i0 - place.row(0), columns = p.m - j0 - place.column(0);
      replace(s, [&](int r, int c) {
        return place.row_offset(r) >= rows || place.column_offset(c) >= columns;
      });
    }
  }

 private:
  template <class Matrix, class Excluded>
  CUTE_DEVICE static void replace(Matrix& s, Excluded excluded) {
    using namespace cute;
    CUTE_UNROLL
    for (int r = 0; r < size<0>(s); ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) {
        if (c % 8 == 0) Warp::fence();
        if (excluded(r, c)) s(r, c) = -kInfinity;
      }
    }
  }

  CUTE_DEVICE bool any_mined() const {
    int found = 0;
    CUTE_UNROLL
    for (int w = 0; w < kWarps; ++w) found |= mined[w];
    return found != 0;
  }

  // Equal ids have equal folded ids.
  CUTE_DEVICE static uint32_t folded(int64_t id) {
    return static_cast<uint32_t>(id) ^ static_cast<uint32_t>(id >> 32);
  }
};

}  // namespace llave
