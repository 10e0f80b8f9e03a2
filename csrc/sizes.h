// How large a tile of the similarity matrix one block works on.
#pragma once

#include "pairs.h"

namespace llave {

constexpr int kColumns = 128;  // of every tile
constexpr int kLargeRows = 128, kSmallRows = 64;

CUTE_HOST_DEVICE constexpr int tiles_over(int length, int tile) {
  return static_cast<int>((int64_t(length) + tile - 1) / tile);
}

// Large tiles multiply faster; they serve calls in which every negative has the same weight, in
// batches that fill the GPU with them. Small tiles serve all else: their threads have registers to
// spare for the rules, and of a small batch there are more of them to spread.
enum class Size { large, small };

inline Size choose_size(const Problem& p, int multiprocessors) {
  const int64_t tiles = int64_t(tiles_over(p.n, kLargeRows)) * tiles_over(p.m, kColumns);
  return uniform_logits(p.rules) && tiles >= multiprocessors ? Size::large : Size::small;
}

}  // namespace llave
