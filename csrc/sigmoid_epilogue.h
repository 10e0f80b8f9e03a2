// Turns a tile of similarities, still in registers, into its part of the sigmoid loss and of dS.
#pragma once

#include "cutlass/numeric_conversion.h"

#include "epilogue.h"
#include "fragment.h"
#include "sigmoid.h"
#include "tile_pairs.h"
#include "tiles.h"

namespace llave {

// log(1 + exp(z)) and its derivative, to the last digits of a small loss too. NaN stays NaN.
struct PairLoss {
  float value, slope;

  CUTE_HOST_DEVICE explicit PairLoss(float z) {
    const float e = exponential(-fabsf(z));
    value = (z > 0.0f ? z : 0.0f) + log_of_one_plus(e);
    slope = (z < 0.0f ? e : 1.0f) * reciprocal(1.0f + e);
  }
};

template <class Warp, class Element, class Tile>
class SigmoidEpilogue : public EpilogueInterface<SigmoidOutputs> {
  using Place_ = Place<Tile>;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  static constexpr int kWarps = Place_::kThreads / 32;
  static constexpr float kLargest = std::numeric_limits<float>::max();

  // Of a thread's pairs: the loss by row, and the gradients of scale and bias.
  struct Sums {
    float loss[Place_::kRowsHeld] = {}, scale = 0.0f, bias = 0.0f;
  };

  // The similarities of a thread's positives, in the rows whose bits are set.
  struct Positives {
    float similarity[Place_::kRowsHeld];
    unsigned rows = 0;
  };

 public:
  struct SharedStorage {
    TilePairs<Warp, Tile> pairs;
    float weights[kRows];
    float scale, bias;
  };
  using TensorStorage = SharedStorage;
  using EpilogueInterface<SigmoidOutputs>::EpilogueInterface;

  template <class Shape, class Block, class Coordinate, class Engine, class Layout, class Mma,
            class Residue>
  CUTE_DEVICE void operator()(Shape, Block, Coordinate tile,
                              cute::Tensor<Engine, Layout> accumulators, Mma, Residue, int thread,
                              char* storage) {
    using namespace cute;
    const Problem& p = params.problem;
    const SigmoidOutputs& out = params.outputs;
    const int i0 = get<0>(tile) * kRows, j0 = get<1>(tile) * kColumns;
    if (i0 >= p.n || j0 >= p.m) return;  // a cluster may reach beyond the last tile

    thread = Warp::opaque(thread);
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    Warp::synchronize(Place_::kThreads);  // the previous tile's data have been read
    shared.pairs.load(p, i0, j0, thread);
    for (int i = thread; i < kRows; i += Place_::kThreads) {
      shared.weights[i] = out.weights == nullptr || i0 + i >= p.n ? 1.0f : out.weights[i0 + i];
    }
    if (thread == 0) {
      shared.scale = p.logit_scale();
      shared.bias = *out.bias;
    }
    Warp::synchronize(Place_::kThreads);

    const Place_ place(thread);
    Tensor s = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    const bool edge = i0 + kRows > p.n || j0 + kColumns > p.m;
    Sums sums;
    Positives positives;
    const bool plain = !edge && shared.pairs.plain(p.rules, s, place, j0);
    if (!plain) positives = take_out(s, place, shared, i0, j0);
    visit(s, place, shared, i0, j0, sums);
    if (!plain) visit(positives, place, shared, i0, j0, sums);
    write(sums, place, shared, thread, i0, j0);
  }

 private:
  // Replaces the similarities of pairs that do not count, and of positives, by one whose pair has
  // neither loss nor slope. Returns the positives.
  template <class Matrix>
  CUTE_DEVICE Positives take_out(Matrix& s, Place_ const& place, SharedStorage const& shared,
                                 int i0, int j0) const {
    using namespace cute;
    const TilePairs<Warp, Tile>& pairs = shared.pairs;
    const int rows = params.problem.n - i0 - place.row(0);
    const int columns = params.problem.m - j0 - place.column(0);
    Positives found;
    CUTE_UNROLL
    for (int r = 0; r < size<0>(s); ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) {
        if (c % 8 == 0) Warp::fence();
        const int i = place.row(r), offset = Place_::column_offset(c);
        const bool beyond = place.row_offset(r) >= rows || offset >= columns;
        const bool mine = pairs.positive_offset(place, j0, i) == offset;
        const bool alike = pairs.row_ids[i] == pairs.column_ids[place.column(c)];
        if (mine && !beyond) {
          found.similarity[r] = s(r, c);
          found.rows |= 1 << r;
        }
        if (beyond || mine || alike) s(r, c) = -kLargest;
      }
    }
    return found;
  }

  // Adds a pair to the sums. Returns its dS. `sign` is the row's weight, negative for a positive,
  // and `z` is then the negative logit.
  CUTE_DEVICE static float add(float similarity, float z, float sign, float& loss, Sums& sums) {
    const PairLoss pair(z);
    const float d = sign * pair.slope;
    loss += pair.value;
    sums.scale = fmaf(d, similarity, sums.scale);
    sums.bias += d;
    return d;
  }

  CUTE_DEVICE float gain_of(SharedStorage const& shared) const {
    const float* gain = params.outputs.gain;
    return gain == nullptr ? shared.scale : shared.scale * *gain;
  }

  // Adds all pairs of the tile to the sums, as negatives, and stores their dS.
  template <class Matrix>
  CUTE_DEVICE void visit(Matrix const& s, Place_ const& place, SharedStorage const& shared, int i0,
                         int j0, Sums& sums) const {
    using namespace cute;
    const SigmoidOutputs& out = params.outputs;
    const float gain = gain_of(shared);
    const int i = i0 + place.row(0), j = j0 + place.column(0);
    const int rows = params.problem.n - i, stored = static_cast<int>(out.pitch) - j;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      CUTE_UNROLL
      for (int r = 0; r < size<0>(s); ++r) {
        // What is read after this depends on it. Otherwise the compiler would compute logits of all
        // pairs at a time, and there are no registers for them.
        Warp::fence();
        const float scale = shared.scale, bias = shared.bias;
        const float weight = shared.weights[Warp::opaque(place.row(r))];
        const bool inside = place.row_offset(r) < rows;
        const auto value_of = [&](int k) {
          const float z = fmaf(s(r, k), scale, bias);
          return gain * add(s(r, k), z, weight, sums.loss[r], sums);
        };
        CUTE_UNROLL
        for (int k = c; k < c + 8; k += 2) {  // two neighbouring columns
          const float first = value_of(k), second = value_of(k + 1);
          const int offset = Place_::column_offset(k);
          if (out.ds != nullptr && inside && offset < stored) {
            // Computed here. Kept from the start, the address spills on sm_90 in float32.
            const int64_t start = (i + place.row_offset(r)) * out.pitch + j;
            store(first, second, static_cast<Element*>(out.ds) + start + offset);
          }
        }
      }
    }
  }

  // The same for the positives that were taken out.
  CUTE_DEVICE void visit(Positives const& found, Place_ const& place, SharedStorage const& shared,
                         int i0, int j0, Sums& sums) const {
    const SigmoidOutputs& out = params.outputs;
    CUTE_UNROLL
    for (int r = 0; r < Place_::kRowsHeld; ++r) {
      if ((found.rows >> r & 1) == 0) continue;
      const int row = place.row(r);
      const float similarity = found.similarity[r], weight = shared.weights[row];
      const float z = fmaf(similarity, shared.scale, shared.bias);
      const float d = add(similarity, -z, -weight, sums.loss[r], sums);
      if (out.ds == nullptr) continue;
      const int64_t column = j0 + place.column(0) + shared.pairs.positive_offset(place, j0, row);
      static_cast<Element*>(out.ds)[(i0 + row) * out.pitch + column] =
          static_cast<Element>(gain_of(shared) * d);
    }
  }

  CUTE_DEVICE static void store(float first, float second, Element* place) {
    if constexpr (sizeof(Element) == 4) {
      *reinterpret_cast<float2*>(place) = {first, second};
    } else {
      const cutlass::NumericArrayConverter<Element, float, 2> convert;
      *reinterpret_cast<cutlass::Array<Element, 2>*>(place) = convert({first, second});
    }
  }

  CUTE_DEVICE void write(Sums const& sums, Place_ const& place, SharedStorage const& shared,
                         int thread, int i0, int j0) const {
    const Problem& p = params.problem;
    const SigmoidOutputs& out = params.outputs;
    const int across = j0 / kColumns;
    const int64_t part = int64_t(across) * Place_::kWarpsAcross + place.warp_across;
    CUTE_UNROLL
    for (int r = 0; r < Place_::kRowsHeld; ++r) {
      const float loss = quad_sum<Warp>(sums.loss[r]);
      const int i = place.row(r);
      if (place.lane % 4 == 0 && i0 + i < p.n) {
        const bool nowhere = shared.pairs.labels[i] == kNowhere;
        out.loss_parts[part * p.n + i0 + i] = nowhere && !elsewhere(i0 + i) ? NAN : loss;
      }
    }
    const float scale = warp_sum<Warp>(sums.scale), bias = warp_sum<Warp>(sums.bias);
    if (thread % 32 == 0) {
      const int64_t number = int64_t(i0 / kRows) * tiles_over(p.m, kColumns) + across;
      float* const place_of_sums = out.sums + (number * kWarps + thread / 32) * 2;
      place_of_sums[0] = scale;
      place_of_sums[1] = bias;
    }
  }

  // Whether the positive of a row without a column is in another block.
  CUTE_DEVICE bool elsewhere(int i) const { return params.problem.rules.labels[i] == kElsewhere; }
};

// The only tile: with more accumulators, losses and slopes find too few registers.
constexpr Size kSigmoidSize = Size::small;

template <int Architecture, class Element>
SigmoidParts sigmoid_parts(const Problem& p) {
  using Place_ = Place<Tile<Architecture, Element, kSigmoidSize>>;
  return {int64_t(tiles_over(p.m, tile_columns(kSigmoidSize))) * Place_::kWarpsAcross,
          tile_count(p.n, p.m, kSigmoidSize) * (Place_::kThreads / 32)};
}

}  // namespace llave
