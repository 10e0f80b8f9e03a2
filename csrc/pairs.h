// Which pairs count, and with which weight: the rules of `llave_kernels/rules.py`, one pair at a
// time.
#pragma once

#include "problem.h"

namespace llave {

// What a rule looks at. A row beyond the edge has label `kOutside`; a label or an owner that is no
// column is `kNowhere` or `kNobody`, which equal no column and not each other.
struct Row {
  int label;
  float limit;
  int64_t id;
};

struct Column {
  int index, owner;
  float limit;
  int64_t id;
};

constexpr int kOutside = -1, kNowhere = -2, kNobody = -3;

// Whether a pair carries the hardness weight, and whether it counts as a negative in each
// direction.
struct Pair {
  bool weighted, in_row, in_column;
};

// A column given in 64 bits, or `otherwise` where there is none of that number.
CUTE_HOST_DEVICE int column_or(int64_t column, int m, int otherwise) {
  return static_cast<uint64_t>(column) < static_cast<uint64_t>(m) ? static_cast<int>(column)
                                                                  : otherwise;
}

CUTE_HOST_DEVICE Row load_row(const Problem& p, int i) {
  if (i >= p.n) return {kOutside, kInfinity, 0};
  return {column_or(p.labels[i], p.m, kNowhere),
          p.row_limit == nullptr ? kInfinity : p.row_limit[i],
          p.query_ids == nullptr ? 0 : p.query_ids[i]};
}

// Reads columns at offsets from one of a thread's: addresses that differ by constants take no
// registers.
struct ColumnReader {
  const int64_t *owners, *ids;
  const float* limits;
  int first, count;

  CUTE_HOST_DEVICE ColumnReader(const Problem& p, int j)
      : owners(p.owners == nullptr ? nullptr : p.owners + j),
        ids(p.target_ids == nullptr ? nullptr : p.target_ids + j),
        limits(p.column_limit == nullptr ? nullptr : p.column_limit + j),
        first(j),
        count(p.m - j) {}

  CUTE_HOST_DEVICE Column operator()(int offset) const {
    const int j = first + offset;
    if (offset >= count) return {j, j, kInfinity, 0};
    return {j, owners == nullptr ? j : column_or(owners[offset], first + count, kNobody),
            limits == nullptr ? kInfinity : limits[offset], ids == nullptr ? 0 : ids[offset]};
  }
};

CUTE_HOST_DEVICE Pair judge(const Problem& p, float similarity, const Row& row,
                            const Column& column) {
  const bool own = column.owner == row.label;
  const bool weighted =
      p.hardness == Hardness::all || own == (p.hardness == Hardness::hard_negatives);
  const bool outside = row.label == kOutside || column.index >= p.m;
  const bool duplicate = p.query_ids != nullptr && row.id == column.id;
  const bool negative = !outside && !duplicate && column.index != row.label;
  return {weighted, negative && (own || !(similarity > row.limit)),
          negative && (own || !(similarity > column.limit))};
}

// Whether a pair has the same logit in both directions.
CUTE_HOST_DEVICE bool shared_logits(const Problem& p) {
  return p.row_limit == nullptr && p.alpha == p.target_alpha;
}

// Whether, beyond that, every pair but a positive counts, with one and the same weight.
CUTE_HOST_DEVICE bool uniform_logits(const Problem& p) {
  return shared_logits(p) && p.owners == nullptr && p.query_ids == nullptr;
}

CUTE_HOST_DEVICE float uniform_scale(const Problem& p, float scale) {
  return p.hardness == Hardness::hard_negatives ? scale : scale + p.alpha;
}

}  // namespace llave
