// Turns a tile of similarities, still in registers, into its part of each row's and each column's
// sum of exponentials. Only the positives are stored, as logits.
#pragma once

#include "epilogue.h"
#include "fragment.h"
#include "pairs.h"
#include "tiles.h"

namespace llave {

template <class Warp, class Element, class Tile>
class ForwardEpilogue : public EpilogueInterface<ForwardOutputs> {
  using Place_ = Place<Tile>;
  static constexpr int kRows = Tile::kRows;
  // If a warp's logits lie no further apart than this, one shift serves all its rows and columns.
  // Each sum keeps float32's relative precision. Merging sums of different tiles loses at most
  // exp(60 - 87) of one.
  static constexpr float kOneShift = 60.0f;

 public:
  struct SharedStorage {
    ShiftedSum rows[Place_::kWarpsAcross][kRows];
    ShiftedSum columns[Place_::kWarpsDown][kColumns];
  };
  using TensorStorage = SharedStorage;
  using EpilogueInterface<ForwardOutputs>::EpilogueInterface;

  template <class Shape, class Block, class Coordinate, class Engine, class Layout, class Mma,
            class Residue>
  CUTE_DEVICE void operator()(Shape, Block, Coordinate tile,
                              cute::Tensor<Engine, Layout> accumulators, Mma, Residue, int thread,
                              char* shared) {
    using namespace cute;
    const Problem& p = params.problem;
    const int tile_row = get<0>(tile), tile_column = get<1>(tile);
    const int i0 = tile_row * kRows, j0 = tile_column * kColumns;
    if (i0 >= p.n || j0 >= p.m) return;  // a cluster may reach beyond the last tile

    SharedStorage& parts = *reinterpret_cast<SharedStorage*>(shared);
    const Place_ place(thread);
    Tensor z = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    constexpr int R = decltype(size<0>(z))::value;
    const float scale = p.logit_scale();
    Row rows[R];
    bool edge = i0 + kRows > p.n || j0 + kColumns > p.m, positives = false;
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      rows[r] = load_row(p, i0 + place.row(r));
      positives |= rows[r].label >= j0 && rows[r].label < j0 + kColumns;
    }
    positives = Warp::any(positives);
    if (positives) store_positives(z, rows, place, scale, i0, j0);

    Warp::synchronize(Place_::kThreads);  // the parts of the previous tile have been read
    const bool uniform = !Tile::kEveryRule || uniform_logits(p.rules);
    // Each branch computes its sums. If the branches met before that, the logits would be copied.
    if (uniform && !edge && !positives) {
      const float factor = uniform_scale(p.rules, scale);
      sum_both(z, place, parts, [&](int r, int c) { return Logit{z(r, c) * factor, true}; });
    } else if (uniform) {
      const float factor = uniform_scale(p.rules, scale);
      sum_both(z, place, parts, [&](int r, int c) {
        return Logit{z(r, c) * factor, negative(p, rows[r], j0 + place.column(c))};
      });
    }
    if constexpr (Tile::kEveryRule) {
      const ColumnReader columns(p, j0 + place.column(0));
      if (!uniform && shared_logits(p.rules)) {
        sum_both(z, place, parts, [&](int r, int c) {
          return logits(p, scale, z(r, c), rows[r], columns(place.column_offset(c))).row;
        });
      } else if (!uniform) {
        sum_each(z, rows, columns, place, parts, scale);
      }
    }
    Warp::synchronize(Place_::kThreads);

    for (int i = thread; i < kRows && i0 + i < p.n; i += Place_::kThreads) {
      ShiftedSum total = parts.rows[0][i];
      CUTE_UNROLL
      for (int w = 1; w < Place_::kWarpsAcross; ++w) total.add(parts.rows[w][i]);
      params.outputs.row_parts[int64_t(tile_column) * p.n + i0 + i] = total;
    }
    if (!p.rules.symmetric) return;
    for (int j = thread; j < kColumns && j0 + j < p.m; j += Place_::kThreads) {
      ShiftedSum total = parts.columns[0][j];
      CUTE_UNROLL
      for (int w = 1; w < Place_::kWarpsDown; ++w) total.add(parts.columns[w][j]);
      params.outputs.column_parts[int64_t(tile_row) * p.m + j0 + j] = total;
    }
  }

 private:
  template <class Matrix, int R>
  CUTE_DEVICE void store_positives(Matrix const& s, const Row (&rows)[R], Place_ const& place,
                                   float scale, int i0, int j0) {
    using namespace cute;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); ++c) {
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) {
        if (rows[r].label == j0 + place.column(c)) {
          params.outputs.positive[i0 + place.row(r)] = scale * s(r, c);
        }
      }
    }
  }

  // For pairs with the same logit in both directions. It turns similarities into logits, in place,
  // and sums them. If the logits lie close enough, it takes one exponential per pair.
  template <class Matrix, class Function>
  CUTE_DEVICE void sum_both(Matrix& z, Place_ const& place, SharedStorage& parts,
                            Function logit_of) {
    using namespace cute;
    // Over all logits, also those that do not count.
    float lowest = kInfinity, highest = -kInfinity;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(z); ++c) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(z); ++r) {
        const Logit logit = logit_of(r, c);
        lowest = fminf(lowest, logit.value);
        highest = fmaxf(highest, logit.value);
        z(r, c) = logit.masked();
      }
    }
    highest = warp_max<Warp>(highest);
    lowest = -warp_max<Warp>(-lowest);
    if (Warp::any(highest - lowest <= kOneShift)) {  // the same in every lane
      sum_together(z, place, highest, parts);
    } else {
      sum_rows(z, place, parts);
      if (params.problem.rules.symmetric) sum_columns(z, place, parts);
    }
  }

  // For directions that differ in alpha or by the margin. Each direction has its own logits. Those
  // of the columns are written in place.
  template <class Matrix, int R>
  CUTE_DEVICE void sum_each(Matrix& z, const Row (&rows)[R], ColumnReader const& columns,
                            Place_ const& place, SharedStorage& parts, float scale) {
    using namespace cute;
    const Problem& p = params.problem;
    auto z_row = make_fragment_like(z);
    CUTE_UNROLL
    for (int c = 0; c < size<1>(z); ++c) {
      const Column column = columns(place.column_offset(c));
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) {
        const Logits pair = logits(p, scale, z(r, c), rows[r], column);
        z_row(r, c) = pair.row.masked();
        z(r, c) = pair.column.masked();
      }
    }
    sum_rows(z_row, place, parts);
    if (p.rules.symmetric) sum_columns(z, place, parts);
  }

  // Where the lane stores the warp's column sums. It stores one column of every eight. The offset
  // of the eight is added to this.
  CUTE_DEVICE static ShiftedSum* column_parts(SharedStorage& parts, Place_ const& place) {
    return parts.columns[place.warp_down] + place.column(place.lane / 4);
  }

  // Takes one exponential for both directions.
  template <class Matrix>
  CUTE_DEVICE void sum_together(Matrix const& z, Place_ const& place, float shift,
                                SharedStorage& parts) {
    using namespace cute;
    constexpr int R = decltype(size<0>(z))::value;
    float row_sums[R] = {};
    CUTE_UNROLL
    for (int c = 0; c < size<1>(z); c += 8) {
      float column_sums[8] = {};
      CUTE_UNROLL
      for (int k = 0; k < 8; ++k) {
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          const float e = exponential(z(r, c + k) - shift);
          row_sums[r] += e;
          column_sums[k] += e;
        }
      }
      if (params.problem.rules.symmetric) {
        const float sum = scattered_sum<Warp>(column_sums, place.lane);
        column_parts(parts, place)[place.column_offset(c)] = {sum == 0.0f ? -kInfinity : shift,
                                                              sum};
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      const float sum = quad_sum<Warp>(row_sums[r]);
      parts.rows[place.warp_across][place.row(r)] = {sum == 0.0f ? -kInfinity : shift, sum};
    }
  }

  template <class Matrix>
  CUTE_DEVICE void sum_rows(Matrix const& z, Place_ const& place, SharedStorage& parts) {
    using namespace cute;
    constexpr int R = decltype(size<0>(z))::value;
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      float highest = -kInfinity, sum = 0.0f;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(z); ++c) highest = fmaxf(highest, z(r, c));
      highest = quad_max<Warp>(highest);
      const float shift = finite(highest);
      CUTE_UNROLL
      for (int c = 0; c < size<1>(z); ++c) sum += exponential(z(r, c) - shift);
      parts.rows[place.warp_across][place.row(r)] = {highest, quad_sum<Warp>(sum)};
    }
  }

  template <class Matrix>
  CUTE_DEVICE void sum_columns(Matrix const& z, Place_ const& place, SharedStorage& parts) {
    using namespace cute;
    constexpr int R = decltype(size<0>(z))::value;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(z); c += 8) {
      float highest = -kInfinity, sums[8] = {};
      CUTE_UNROLL
      for (int k = 0; k < 8; ++k) {
        float column = -kInfinity;
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) column = fmaxf(column, z(r, c + k));
        column = column_max<Warp>(column);
        const float shift = finite(column);
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) sums[k] += exponential(z(r, c + k) - shift);
        if (k == place.lane / 4) highest = column;
      }
      column_parts(parts, place)[place.column_offset(c)] = {highest,
                                                            scattered_sum<Warp>(sums, place.lane)};
    }
  }
};

}  // namespace llave
