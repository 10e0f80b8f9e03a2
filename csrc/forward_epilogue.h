// Turns a tile of similarities, still in registers, into its part of each row's and each column's
// sum of exponentials. Of the tile itself only the positives are stored, as logits, unless the
// backward gets all similarities (kept.h).
#pragma once

#include "epilogue.h"
#include "fragment.h"
#include "kept.h"
#include "tile_pairs.h"
#include "tiles.h"

namespace llave {

template <class Warp, class Element, class Tile>
class ForwardEpilogue : public EpilogueInterface<ForwardOutputs> {
  using Place_ = Place<Tile>;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  // One shift serves a warp if each of its sums lies between these. Each sum then keeps float32's
  // relative precision, and merging it with another loses at most exp(40 + 20 - 87) of either.
  static constexpr float kLowestSum = 4.2e-18f, kHighestSum = 4.8e8f;  // exp(-40), exp(20)

 public:
  struct SharedStorage {
    TilePairs<Warp, Tile> pairs;
    ShiftedSum rows[Place_::kWarpsAcross][kRows];
    ShiftedSum columns[Place_::kWarpsDown][kColumns];
  };
  using TensorStorage = SharedStorage;
  using EpilogueInterface<ForwardOutputs>::EpilogueInterface;

  template <class Shape, class Block, class Coordinate, class Engine, class Layout, class Mma,
            class Residue>
  CUTE_DEVICE void operator()(Shape, Block, Coordinate tile,
                              cute::Tensor<Engine, Layout> accumulators, Mma, Residue, int thread,
                              char* storage) {
    using namespace cute;
    const Problem& p = params.problem;
    const Rules& rules = p.rules;
    const int tile_row = get<0>(tile), tile_column = get<1>(tile);
    const int i0 = tile_row * kRows, j0 = tile_column * kColumns;
    if (i0 >= p.n || j0 >= p.m) return;  // a cluster may reach beyond the last tile

    thread = Warp::opaque(thread);
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    Warp::synchronize(Place_::kThreads);  // the previous tile's data have been read
    shared.pairs.load(p, i0, j0, thread);
    Warp::synchronize(Place_::kThreads);

    const Place_ place(thread);
    Tensor s = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    const Kept& kept = params.outputs.kept;
    if (kept.similarities != nullptr) store_kept(s, place, kept, p.n, i0, j0);
    const bool edge = i0 + kRows > p.n || j0 + kColumns > p.m;
    const bool plain = !edge && shared.pairs.plain(rules, s, place, j0);
    if (plain) {
      sum_plain(s, place, shared);
    } else {
      store_positives(s, shared, place, p.logit_scale(), i0, j0);
      shared.pairs.exclude(p, s, place, i0, j0);
      sum_ruled(s, place, shared);
    }
    if (!shift_serves(place, shared, i0, j0)) sum_apart(s, place, shared);
    Warp::synchronize(Place_::kThreads);

    for (int i = thread; i < kRows && i0 + i < p.n; i += Place_::kThreads) {
      ShiftedSum total = shared.rows[0][i];
      CUTE_UNROLL
      for (int w = 1; w < Place_::kWarpsAcross; ++w) total.add(shared.rows[w][i]);
      params.outputs.row_parts[int64_t(tile_column) * p.n + i0 + i] = total;
    }
    if (!rules.symmetric) return;
    for (int j = thread; j < kColumns && j0 + j < p.m; j += Place_::kThreads) {
      ShiftedSum total = shared.columns[0][j];
      CUTE_UNROLL
      for (int w = 1; w < Place_::kWarpsDown; ++w) total.add(shared.columns[w][j]);
      params.outputs.column_parts[int64_t(tile_row) * p.m + j0 + j] = total;
    }
  }

 private:
  template <class Matrix>
  CUTE_DEVICE void store_positives(Matrix const& s, SharedStorage const& shared,
                                   Place_ const& place, float scale, int i0, int j0) {
    using namespace cute;
    CUTE_UNROLL
    for (int r = 0; r < size<0>(s); ++r) {
      const int column = shared.pairs.positive_offset(place, j0, place.row(r));
      float similarity = 0.0f;
      bool found = false;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) {
        if (column == place.column_offset(c)) {
          similarity = s(r, c);
          found = true;
        }
      }
      if (found) params.outputs.positive[i0 + place.row(r)] = scale * similarity;
    }
  }

  // Plain pairs take one exponential if they have the same logit in both directions.
  template <class Matrix>
  CUTE_DEVICE void sum_plain(Matrix const& s, Place_ const& place, SharedStorage& shared) const {
    const Rules& rules = params.problem.rules;
    const Factors other(rules, params.problem.logit_scale(), false);
    const float shift = other.row * common_shift(s, [&](int r, int c) { return s(r, c); });
    const auto row_logit = [&](int r, int c) { return s(r, c) * other.row; };
    if (rules.symmetric && other.row == other.column) {
      sum_both(s, place, shared, shift, row_logit);
    } else {
      sum_rows(s, place, shared, shift, row_logit);
      if (rules.symmetric) {
        sum_columns(s, place, shared, shift, [&](int r, int c) { return s(r, c) * other.column; });
      }
    }
  }

  // The logits of pairs that may be the row's own, or left out.
  template <class Matrix>
  struct RuledLogits {
    Matrix const& s;
    Place_ const& place;
    TilePairs<Warp, Tile> const& pairs;
    Factors own, other;

    CUTE_DEVICE RuledLogits(Matrix const& s, Place_ const& place, SharedStorage const& shared,
                            Problem const& p)
        : s(s),
          place(place),
          pairs(shared.pairs),
          own(p.rules, p.logit_scale(), true),
          other(p.rules, p.logit_scale(), false) {}

    CUTE_DEVICE bool is_own(int r, int c) const {
      return pairs.owners[place.column(c)] == pairs.labels[place.row(r)];
    }
    CUTE_DEVICE float row(int r, int c) const {
      const float limit = pairs.row_limits[place.row(r)];
      return pairs.with_column_bias(logit(s(r, c), is_own(r, c), limit, own.row, other.row),
                                    place.column(c));
    }
    CUTE_DEVICE float column(int r, int c) const {
      const float limit = pairs.column_limits[place.column(c)];
      return pairs.with_row_bias(logit(s(r, c), is_own(r, c), limit, own.column, other.column),
                                 place.row(r));
    }
  };

  // Two loops with one exponential each take fewer registers than one loop with two.
  template <class Matrix>
  CUTE_DEVICE void sum_ruled(Matrix const& s, Place_ const& place, SharedStorage& shared) const {
    const Problem& p = params.problem;
    const RuledLogits<Matrix> z(s, place, shared, p);
    const float shift = common_shift(s, [&](int r, int c) { return z.row(r, c); });
    sum_rows(s, place, shared, shift, [&](int r, int c) { return z.row(r, c); });
    Warp::fence();
    if (p.rules.symmetric) {
      sum_columns(s, place, shared, shift, [&](int r, int c) { return z.column(r, c); });
    }
  }

  // A guess at a shift for all pairs of the warp: the largest value of every eighth column.
  template <class Matrix, class Values>
  CUTE_DEVICE static float common_shift(Matrix const& s, Values value_of) {
    using namespace cute;
    float shift = -kInfinity;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(s); ++r) shift = fmaxf(shift, value_of(r, c));
    }
    return finite(warp_max<Warp>(shift));
  }

  // Sums rows and columns, whose logits are the same. Takes one exponential per pair.
  template <class Matrix, class Logits>
  CUTE_DEVICE static void sum_both(Matrix const& s, Place_ const& place, SharedStorage& shared,
                                   float shift, Logits logit_of) {
    using namespace cute;
    constexpr int R = decltype(size<0>(s))::value;
    float row_sums[R] = {};
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      const float sum = scattered_sum<Warp>(place.lane, [&](int k) {
        float column = 0.0f;
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          const float e = exponential(logit_of(r, c + k) - shift);
          row_sums[r] += e;
          column += e;
        }
        return column;
      });
      column_part(shared, place, c) = {sum == 0.0f ? -kInfinity : shift, sum};
    }
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) store_row(row_sums[r], r, place, shared, shift);
  }

  template <class Matrix, class Logits>
  CUTE_DEVICE static void sum_rows(Matrix const& s, Place_ const& place, SharedStorage& shared,
                                   float shift, Logits logit_of) {
    using namespace cute;
    CUTE_UNROLL
    for (int r = 0; r < size<0>(s); ++r) {
      Warp::fence();
      float sum = 0.0f;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) sum += exponential(logit_of(r, c) - shift);
      store_row(sum, r, place, shared, shift);
    }
  }

  template <class Matrix, class Logits>
  CUTE_DEVICE static void sum_columns(Matrix const& s, Place_ const& place, SharedStorage& shared,
                                      float shift, Logits logit_of) {
    using namespace cute;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      const float sum = scattered_sum<Warp>(place.lane, [&](int k) {
        float column = 0.0f;
        CUTE_UNROLL
        for (int r = 0; r < size<0>(s); ++r) column += exponential(logit_of(r, c + k) - shift);
        return column;
      });
      column_part(shared, place, c) = {sum == 0.0f ? -kInfinity : shift, sum};
    }
  }

  CUTE_DEVICE static void store_row(float sum, int r, Place_ const& place, SharedStorage& shared,
                                    float shift) {
    sum = quad_sum<Warp>(sum);
    shared.rows[place.warp_across][place.row(r)] = {sum == 0.0f ? -kInfinity : shift, sum};
  }

  // A lane stores one of every eight columns of the warp.
  CUTE_DEVICE static ShiftedSum& column_part(SharedStorage& shared, Place_ const& place, int c) {
    return shared.columns[place.warp_down][place.column(place.lane / 4) + Place_::column_offset(c)];
  }

  // Whether the shift serves all rows and columns of the warp. Sums beyond the edges are 0.
  CUTE_DEVICE bool shift_serves(Place_ const& place, SharedStorage& shared, int i0, int j0) const {
    const Problem& p = params.problem;
    const int rows = p.n - i0 - place.row(0);
    const int columns = p.m - j0 - place.column(place.lane / 4);
    const bool any = rows + place.lane / 4 > 0 && p.m - j0 - place.column(0) > 0;
    float lowest = kInfinity, highest = 0.0f;
    const auto check = [&](float sum, bool inside) {
      if (any && inside) lowest = fminf(lowest, sum);
      highest = fmaxf(highest, sum);
    };
    CUTE_UNROLL
    for (int r = 0; r < Place_::kRowsHeld; ++r) {
      check(shared.rows[place.warp_across][place.row(r)].sum, Place_::row_offset(r) < rows);
    }
    if (p.rules.symmetric) {
      CUTE_UNROLL
      for (int c = 0; c < Place_::kColumnsHeld; c += 8) {
        check(column_part(shared, place, c).sum, Place_::column_offset(c) < columns);
      }
    }
    return !Warp::any(lowest < kLowestSum || highest > kHighestSum);
  }

  // Sums each row and each column with a shift of its own.
  template <class Matrix>
  CUTE_DEVICE void sum_apart(Matrix const& s, Place_ const& place, SharedStorage& shared) const {
    using namespace cute;
    const RuledLogits<Matrix> z(s, place, shared, params.problem);
    CUTE_UNROLL
    for (int r = 0; r < size<0>(s); ++r) {
      Warp::fence();
      ShiftedSum row = ShiftedSum::nothing();
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) row.add({z.row(r, c), 1.0f});
      add_lane(row, 1);
      add_lane(row, 2);
      if (place.lane % 4 == 0) shared.rows[place.warp_across][place.row(r)] = row;
    }
    Warp::fence();
    if (!params.problem.rules.symmetric) return;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); ++c) {
      ShiftedSum column = ShiftedSum::nothing();
      CUTE_UNROLL
      for (int r = 0; r < size<0>(s); ++r) column.add({z.column(r, c), 1.0f});
      add_lane(column, 4);
      add_lane(column, 8);
      add_lane(column, 16);
      if (place.lane / 4 == c % 8) shared.columns[place.warp_down][place.column(c)] = column;
    }
  }

  CUTE_DEVICE static void add_lane(ShiftedSum& sum, int mask) {
    sum.add({Warp::shuffle_xor(sum.shift, mask), Warp::shuffle_xor(sum.sum, mask)});
  }
};

}  // namespace llave
