// The size of the tile of the similarity matrix that one block works on.
#pragma once

#include "pairs.h"

namespace llave {

constexpr int kColumns = 128;  // columns of every tile
constexpr int kLargeRows = 128, kSmallRows = 64;

CUTE_HOST_DEVICE constexpr int tiles_over(int length, int tile) {
  return static_cast<int>((int64_t(length) + tile - 1) / tile);
}

// Large tiles multiply faster. They serve calls in which every negative has the same weight, if the
// batch has enough of them to fill the GPU. Small tiles serve all other calls. Their threads have
// registers left for the rules. A small batch has more of them to spread over the GPU.
enum class Size { large, small };

inline Size choose_size(const Problem& p, int multiprocessors) {
  const int64_t tiles = int64_t(tiles_over(p.n, kLargeRows)) * tiles_over(p.m, kColumns);
  return uniform_logits(p.rules) && tiles >= multiprocessors ? Size::large : Size::small;
}

}  // namespace llave
