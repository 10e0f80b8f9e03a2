// Stores a thread's values of a tile in the inputs' type.
#pragma once

#include "cutlass/numeric_conversion.h"

#include "fragment.h"

namespace llave {

template <class Warp, class Element, class Tile>
struct StoreTile {
  using Place_ = Place<Tile>;

  // Stores values of a thread's pairs into `ds` (n, pitch), eight of its columns at a time. They
  // are two columns from each of four blocks of eight. `values_of(r)(c)` gives the value of a pair.
  template <class Matrix, class Values>
  CUTE_DEVICE static void all(Matrix const& s, Place_ const& place, void* tile, int64_t pitch,
                              int n, int i0, int j0, Values values_of) {
    using namespace cute;
    constexpr int R = decltype(size<0>(s))::value;
    // The first of the columns that the lane stores at a time: two of its own, or eight of 2 bytes.
    const int first = sizeof(Element) == 4 ? 0 : place.lane % 4 * 2;
    const int i = i0 + place.row(0), j = j0 + place.column(first) - first;
    const int rows = n - i, columns = static_cast<int>(pitch) - j;
    Element* const ds = static_cast<Element*>(tile) + i * pitch + j;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 8) {
      CUTE_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto value_of = values_of(r);
        float values[8];
        CUTE_UNROLL
        for (int k = 0; k < 8; ++k) values[k] = value_of(c + k);
        eight(values, ds + place.row_offset(r) * pitch, place.row_offset(r) < rows, columns, c,
              place.lane);
      }
    }
  }

 private:
  CUTE_DEVICE static void eight(const float (&values)[8], Element* row, bool inside, int columns,
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

}  // namespace llave
