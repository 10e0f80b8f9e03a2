// The similarities that a forward keeps for its backward: (n, pitch) in device memory. The pitch is
// even and at least m.
#pragma once

#include "fragment.h"
#include "problem.h"

namespace llave {

// Calls `visit(r, c, pair)` for each two neighbouring columns c and c + 1 of a thread's matrix that
// lie within the rows and the pitch. `pair` is their place in memory.
template <class Matrix, class Tile, class Visit>
CUTE_DEVICE void visit_kept(Matrix const& s, Place<Tile> const& place, Kept const& kept, int n,
                            int i0, int j0, Visit visit) {
  using namespace cute;
  const int i = i0 + place.row(0), j = j0 + place.column(0);
  const int rows = n - i, columns = static_cast<int>(kept.pitch) - j;
  float* const first = kept.similarities + i * kept.pitch + j;
  CUTE_UNROLL
  for (int r = 0; r < size<0>(s); ++r) {
    float* const row = first + place.row_offset(r) * kept.pitch;
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); c += 2) {
      const int offset = place.column_offset(c);
      if (place.row_offset(r) < rows && offset < columns) {
        visit(r, c, *reinterpret_cast<float2*>(row + offset));
      }
    }
  }
}

template <class Matrix, class Tile>
CUTE_DEVICE void store_kept(Matrix const& s, Place<Tile> const& place, Kept const& kept, int n,
                            int i0, int j0) {
  visit_kept(s, place, kept, n, i0, j0,
             [&](int r, int c, float2& pair) { pair = {s(r, c), s(r, c + 1)}; });
}

// Pairs beyond the edges become 0.
template <class Matrix, class Tile>
CUTE_DEVICE void load_kept(Matrix& s, Place<Tile> const& place, Kept const& kept, int n, int i0,
                           int j0) {
  cute::clear(s);
  visit_kept(s, place, kept, n, i0, j0, [&](int r, int c, float2 const& pair) {
    s(r, c) = pair.x;
    s(r, c + 1) = pair.y;
  });
}

}  // namespace llave
