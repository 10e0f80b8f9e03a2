// The size of the tile of the similarity matrix that one block works on.
#pragma once

#include <cstdint>

#include "cute/config.hpp"

namespace llave {

// Larger tiles multiply faster, because they read less of both matrices for each product.
enum class Size { widest, wide, large, small };

CUTE_HOST_DEVICE constexpr int tile_rows(Size size) {
  return size == Size::small ? 64 : 128;
}
CUTE_HOST_DEVICE constexpr int tile_columns(Size size) {
  return size == Size::widest ? 192 : size == Size::wide ? 160 : 128;
}
constexpr int kMostRows = 128, kFewestRows = 64, kFewestColumns = 128, kMostWarps = 8,
              kMostWarpsAcross = 2;

CUTE_HOST_DEVICE constexpr int tiles_over(int length, int tile) {
  return static_cast<int>((int64_t(length) + tile - 1) / tile);
}

CUTE_HOST_DEVICE constexpr int64_t tile_count(int n, int m, Size size) {
  return int64_t(tiles_over(n, tile_rows(size))) * tiles_over(m, tile_columns(size));
}

// The GPU works on `multiprocessors` tiles at a time. In the last round, some multiprocessors have
// no tile. That costs more time if tiles are larger. So `largest` serves batches of at least six
// rounds, and large tiles serve those of at least one. A small batch has more small tiles to spread
// over the GPU.
inline Size choose_size(int n, int m, int multiprocessors, Size largest) {
  if (largest == Size::small) return Size::small;
  const auto rounds = [&](Size size) { return tile_count(n, m, size) / multiprocessors; };
  if (rounds(largest) >= 6) return largest;
  return rounds(Size::large) >= 1 ? Size::large : Size::small;
}

}  // namespace llave
