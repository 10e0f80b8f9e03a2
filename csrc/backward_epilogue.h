// Turns a tile of similarities, still in registers, into its part of dS in the inputs' type.
#pragma once

#include "cutlass/numeric_conversion.h"

#include "epilogue.h"
#include "fragment.h"
#include "tile_pairs.h"
#include "tiles.h"

namespace llave {

// A tile whose log-sum-exps all lie within a window takes one exponential per pair where both
// directions share the logit z. With c the window's upper end,
//   dS = exp(z - c) (d_query exp(c - lse_query) + d_target exp(c - lse_target)).
// Each pair that counts has z <= both lse <= c, so exp(z - c) is at most 1. It vanishes below
// exp(-87). A pair that vanishes has a share below exp(-87 + kWindow), or 4e-21, of either sum. The
// other exponentials lie between 1 and exp(kWindow), so a small upstream gradient loses no digits.
// Whatever is not finite, or overflows, lies outside the window.
template <class Warp, class Element, class Tile>
class BackwardEpilogue : public EpilogueInterface<BackwardOutputs> {
  using Place_ = Place<Tile>;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static constexpr int kWarps = Place_::kThreads / 32;
  static constexpr float kWindow = 40.0f, kLargest = 1e30f;
  static constexpr float kLargestSimilarity = std::numeric_limits<float>::max();
  // Whether it sums the scale's gradient. In larger tiles the sum takes registers that are not
  // left.
  static constexpr bool kSumsScale = kRows == tile_rows(Size::small);

  // Of a tile's rows or columns: the log-sum-exp without its own bias, the upstream gradient, and
  // what the gradient weighs in the window.
  template <int kLength>
  struct Side {
    float lse[kLength], gradient[kLength], weight[kLength];

    // Returns whether it lies in the window. Beyond the edge, everything is 0.
    CUTE_DEVICE bool load(int k, float lse_k, float gradient_k, float c) {
      lse[k] = finite(lse_k);
      gradient[k] = gradient_k;
      weight[k] = gradient_k * exponential(c - lse[k]);
      return lse_k <= c && lse_k >= c - kWindow && fabsf(weight[k]) <= kLargest;
    }
    CUTE_DEVICE void load_nothing(int k) { lse[k] = gradient[k] = weight[k] = 0.0f; }
  };

 public:
  struct SharedStorage {
    TilePairs<Warp, Tile> pairs;
    Side<kRows> rows;
    Side<kColumns> columns;
    float positive[kRows];
    int outside[kWarps];  // whether some row or column that the warp loaded is not in the window
  };
  using TensorStorage = SharedStorage;
  using EpilogueInterface<BackwardOutputs>::EpilogueInterface;

  template <class Shape, class Block, class Coordinate, class Engine, class Layout, class Mma,
            class Residue>
  CUTE_DEVICE void operator()(Shape, Block, Coordinate tile,
                              cute::Tensor<Engine, Layout> accumulators, Mma, Residue, int thread,
                              char* storage) {
    using namespace cute;
    const Problem& p = params.problem;
    const Rules& rules = p.rules;
    const BackwardOutputs& out = params.outputs;
    const int i0 = get<0>(tile) * kRows, j0 = get<1>(tile) * kColumns;
    if (i0 >= p.n || j0 >= p.m) return;  // a cluster may reach beyond the last tile

    thread = Warp::opaque(thread);
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const float scale = p.logit_scale();
    const float upper = out.query_lse[i0] + kWindow / 2;
    Warp::synchronize(Place_::kThreads);  // the previous tile's data have been read
    shared.pairs.load(p, i0, j0, thread);
    load_sides(shared, i0, j0, thread, upper, scale);
    Warp::synchronize(Place_::kThreads);

    const Place_ place(thread);
    Tensor s = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    const Factors other(rules, scale, false), own(rules, scale, true);
    bool in_window = true;
    CUTE_UNROLL
    for (int w = 0; w < kWarps; ++w) in_window = in_window && !shared.outside[w];
    // The sum takes no pairs beyond the edges. What is stored of them does not matter.
    const bool edge = kSumsScale && (i0 + kRows > p.n || j0 + kColumns > p.m);
    const bool plain = in_window && !edge && shared.pairs.plain(rules, s, place, j0);
    float sum = 0.0f;  // of dS_ij s_ij over the thread's negatives
    const auto add = [&](float d, float similarity) {
      if constexpr (kSumsScale) sum = fmaf(d, similarity, sum);
    };
    if (plain && (other.row == other.column || !rules.symmetric)) {
      const float factor = other.row;
      store(s, place, i0, j0, [&](int r) {
        const float weight = shared.rows.weight[place.row(r)];
        return [=, &s, &shared, &add](int c) {
          const float d = exponential(fmaf(s(r, c), factor, -upper)) *
                          (weight + shared.columns.weight[place.column(c)]);
          add(d, s(r, c));
          return d;
        };
      });
    } else if (plain) {
      store(s, place, i0, j0, [&](int r) {
        const float weight = shared.rows.weight[place.row(r)];
        return [=, &s, &shared, &add](int c) {
          const float d = exponential(fmaf(s(r, c), other.row, -upper)) * weight +
                          exponential(fmaf(s(r, c), other.column, -upper)) *
                              shared.columns.weight[place.column(c)];
          add(d, s(r, c));
          return d;
        };
      });
    } else {
      shared.pairs.exclude(p, s, place, i0, j0);
      store(s, place, i0, j0, [&](int r) {
        const int i = Warp::opaque(place.row(r));
        const int label = shared.pairs.labels[i];
        const int positive = shared.pairs.positive_offset(place, j0, i);
        const float limit = shared.pairs.row_limits[i], gradient = shared.rows.gradient[i],
                    lse = shared.rows.lse[i], d_positive = shared.positive[i];
        return [=, &s, &shared, &add](int c) {
          const int j = place.column(c);
          const bool mine = shared.pairs.owners[j] == label;
          const float z = logit(s(r, c), mine, limit, own.row, other.row);
          float d = gradient * exponential(shared.pairs.with_column_bias(z, j) - lse);
          if (rules.symmetric) {
            const float y =
                logit(s(r, c), mine, shared.pairs.column_limits[j], own.column, other.column);
            d += shared.columns.gradient[j] *
                 exponential(shared.pairs.with_row_bias(y, i) - shared.columns.lse[j]);
          }
          add(d, fmaxf(s(r, c), -kLargestSimilarity));  // d is 0 at -infinity
          return positive == Place_::column_offset(c) ? d_positive : d;
        };
      });
    }
    if constexpr (kSumsScale) {
      if (out.scale_parts != nullptr) store_scale_part(sum, shared, thread, i0, j0, scale);
    }
  }

 private:
  CUTE_DEVICE void load_sides(SharedStorage& shared, int i0, int j0, int thread, float upper,
                              float scale) const {
    const Problem& p = params.problem;
    const BackwardOutputs& out = params.outputs;
    const float gain = out.gain == nullptr ? scale : scale * *out.gain;
    bool inside = true;
    for (int k = thread; k < kRows; k += Place_::kThreads) {
      const int i = i0 + k;
      if (i < p.n) {
        // This thread has loaded the bias itself.
        inside &= shared.rows.load(k, shared.pairs.without_row_bias(out.query_lse[i], k),
                                   out.d_query_lse[i] * gain, upper);
        shared.positive[k] = out.d_positive[i] * gain;
      } else {
        shared.rows.load_nothing(k);
        shared.positive[k] = 0.0f;
      }
    }
    for (int k = thread; k < kColumns; k += Place_::kThreads) {
      const int j = j0 + k;
      if (p.rules.symmetric && j < p.m) {
        inside &= shared.columns.load(k, shared.pairs.without_column_bias(out.target_lse[j], k),
                                      out.d_target_lse[j] * gain, upper);
      } else {
        shared.columns.load_nothing(k);
      }
    }
    const bool outside = Warp::any(!inside);
    if (thread % 32 == 0) shared.outside[thread / 32] = outside;
  }

  // Stores dS of a thread's pairs, eight of its columns at a time. They are two columns from each
  // of four blocks of eight. `values_of(r)(c)` gives the value of a pair.
  template <class Matrix, class Values>
  CUTE_DEVICE void store(Matrix const& s, Place_ const& place, int i0, int j0,
                         Values values_of) const {
    using namespace cute;
    const BackwardOutputs& out = params.outputs;
    constexpr int R = decltype(size<0>(s))::value;
    // The first of the columns that the lane stores at a time: two of its own, or eight of 2 bytes.
    const int first = sizeof(Element) == 4 ? 0 : place.lane % 4 * 2;
    const int i = i0 + place.row(0), j = j0 + place.column(first) - first;
    const int rows = params.problem.n - i, columns = static_cast<int>(out.pitch) - j;
    Element* const ds = static_cast<Element*>(out.ds) + i * out.pitch + j;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto value_of = values_of(r);
        float values[8];
        CUTE_UNROLL
        for (int k = 0; k < 8; ++k) values[k] = value_of(c + k);
        store(values, ds + place.row_offset(r) * out.pitch, place.row_offset(r) < rows, columns, c,
              place.lane);
      }
    }
  }

  // d logit_scale is the sum of dS_ij s_ij over the scale. `sum` is the thread's sum over
  // negatives.
  CUTE_DEVICE void store_scale_part(float sum, SharedStorage const& shared, int thread, int i0,
                                    int j0, float scale) const {
    const BackwardOutputs& out = params.outputs;
    for (int k = thread; k < kRows && i0 + k < params.problem.n; k += Place_::kThreads) {
      const int column = shared.pairs.labels[k] - j0;
      if (column >= 0 && column < kColumns) {
        const float logit = shared.pairs.without_row_bias(out.positive[i0 + k], k);
        sum += shared.positive[k] * (shared.pairs.without_column_bias(logit, column) / scale);
      }
    }
    sum = warp_sum<Warp>(sum);
    const int64_t number =
        int64_t(i0 / kRows) * tiles_over(params.problem.m, kColumns) + j0 / kColumns;
    if (thread % 32 == 0) out.scale_parts[number * kWarps + thread / 32] = sum / scale;
  }

  CUTE_DEVICE static void store(const float (&values)[8], Element* row, bool inside, int columns,
                                int c, int lane) {
    using namespace cute;
    if constexpr (sizeof(Element) == 4) {  // a quad's pairs are already 32 contiguous bytes
      CUTE_UNROLL
      for (int k = 0; k < 8; k += 2) {
        const int j = Place_::column_offset(c + k);
        if (inside && j < columns) *reinterpret_cast<float2*>(row + j) = {values[k], values[k + 1]};
      }
    } else {  // each lane collects eight columns (16 bytes) from its quad
      cutlass::NumericArrayConverter<Element, float, 2> convert;
      uint32_t words[4];
      CUTE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const cutlass::Array<Element, 2> pair = convert({values[2 * k], values[2 * k + 1]});
        words[k] = reinterpret_cast<uint32_t const&>(pair);
      }
      transpose_quad<Warp>(words, lane);
      const int j = Place_::column_offset(c);
      if (inside && j < columns) {
        *reinterpret_cast<uint4*>(row + j) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
};

// How many parts of the scale's gradient a backward writes if they are asked for: one of each warp
// of each small tile. Larger tiles write none.
template <int Architecture, class Element>
int64_t scale_parts(const Problem& p, Size size) {
  if (size != Size::small) return 0;
  constexpr int warps = Place<Tile<Architecture, Element, Size::small>>::kThreads / 32;
  return tile_count(p.n, p.m, size) * warps;
}

}  // namespace llave
