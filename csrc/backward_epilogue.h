// Turns a tile of similarities, still in registers, into its part of dS in the inputs' type.
#pragma once

#include "cutlass/numeric_conversion.h"

#include "epilogue.h"
#include "fragment.h"
#include "pairs.h"
#include "tiles.h"

namespace llave {

template <class Warp, class Element, class Tile>
class BackwardEpilogue : public EpilogueInterface<BackwardOutputs> {
  using Place_ = Place<Tile>;
  static constexpr int kRows = Tile::kRows;

 public:
  struct SharedStorage {};
  using TensorStorage = SharedStorage;
  using EpilogueInterface<BackwardOutputs>::EpilogueInterface;

  template <class Shape, class Block, class Coordinate, class Engine, class Layout, class Mma,
            class Residue>
  CUTE_DEVICE void operator()(Shape, Block, Coordinate tile,
                              cute::Tensor<Engine, Layout> const& accumulators, Mma, Residue,
                              int thread, char*) {
    using namespace cute;
    const Problem& p = params.problem;
    const BackwardOutputs& out = params.outputs;
    const int i0 = get<0>(tile) * kRows, j0 = get<1>(tile) * kColumns;
    if (i0 >= p.n || j0 >= p.m) return;  // a cluster may reach beyond the last tile

    const Place_ place(thread);
    Tensor s = make_tensor(accumulators.data(), matrix_layout(accumulators.layout()));
    constexpr int R = decltype(size<0>(s))::value;
    const float scale = p.logit_scale();
    const float gain = out.gain == nullptr ? scale : scale * *out.gain;
    Row rows[R];
    float query_lse[R], d_query[R], d_positive[R];
    CUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      const int i = i0 + place.row(r);
      rows[r] = load_row(p, i);
      query_lse[r] = i < p.n ? finite(out.query_lse[i]) : 0.0f;
      d_query[r] = i < p.n ? out.d_query_lse[i] * gain : 0.0f;
      d_positive[r] = i < p.n ? out.d_positive[i] * gain : 0.0f;
    }
    const bool uniform = !Tile::kEveryRule || uniform_logits(p.rules);
    const float factor = uniform_scale(p.rules, scale);
    const ColumnReader columns(p, j0 + place.column(0));
    // Eight of the thread's columns at a time. They are two columns from each of four blocks of
    // eight.
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      float ds[R][8];
      CUTE_UNROLL
      for (int k = 0; k < 8; ++k) {
        const int j = j0 + place.column(c + k);
        const bool both = p.rules.symmetric && j < p.m;
        const float target_lse = both ? finite(out.target_lse[j]) : 0.0f;
        const float d_target = both ? out.d_target_lse[j] * gain : 0.0f;
        const Column column =
            uniform ? Column{j, j, kInfinity, 0} : columns(place.column_offset(c + k));
        CUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          const float similarity = s(r, c + k);
          float z_row, z_column;
          if (uniform) {
            z_row = z_column = similarity * factor;
          } else {
            const Logits pair = logits(p, scale, similarity, rows[r], column);
            z_row = pair.row.masked();
            z_column = pair.column.masked();
          }
          float d = d_query[r] * exponential(z_row - query_lse[r]);
          if (p.rules.symmetric) d += d_target * exponential(z_column - target_lse);
          ds[r][k] = j == rows[r].label ? d_positive[r] : d;
        }
      }
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) {
        const int i = i0 + place.row(r);
        store(ds[r], static_cast<Element*>(out.ds) + i * out.pitch + j0, i < p.n, c, place,
              static_cast<int>(out.pitch) - j0);
      }
    }
  }

 private:
  // Stores four pairs of neighbouring columns of a row. The tile's part of the row starts at `p`.
  // The row ends `room` columns later.
  CUTE_DEVICE static void store(const float (&ds)[8], Element* p, bool inside, int c,
                                Place_ const& place, int room) {
    using namespace cute;
    if constexpr (sizeof(Element) == 4) {  // a quad's pairs are already 32 contiguous bytes
      CUTE_UNROLL
      for (int k = 0; k < 8; k += 2) {
        const int j = place.column(c + k);
        if (inside && j < room) *reinterpret_cast<float2*>(p + j) = {ds[k], ds[k + 1]};
      }
    } else {  // each lane collects eight columns (16 bytes) from its quad
      cutlass::NumericArrayConverter<Element, float, 2> convert;
      uint32_t words[4];
      CUTE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const cutlass::Array<Element, 2> pair = convert({ds[2 * k], ds[2 * k + 1]});
        words[k] = reinterpret_cast<uint32_t const&>(pair);
      }
      transpose_quad<Warp>(words, place.lane);
      const int lane = place.lane % 4;
      const int j = place.column(c + 2 * lane) - 2 * lane;
      if (inside && j < room) {
        *reinterpret_cast<uint4*>(p + j) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
};

}  // namespace llave
