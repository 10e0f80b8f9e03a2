// Which pairs count and how they are weighted. These are the rules of `llave_kernels/rules.py` for
// one pair.
#pragma once

#include "problem.h"

namespace llave {

// What the rules read of a row and of a column. A row beyond the edge has the label `kOutside`. A
// label that is no column becomes `kNowhere`. An owner that is no column becomes `kNobody`. They
// equal no column and not each other.
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

// A pair's logit in one direction, and whether the pair counts there as a negative.
struct Logit {
  float value;
  bool counts;

  CUTE_HOST_DEVICE float masked() const { return counts ? value : -kInfinity; }
};

struct Logits {
  Logit row, column;
};

// A 64-bit column number as an int, or `otherwise` if there is no such column.
CUTE_HOST_DEVICE int column_or(int64_t column, int m, int otherwise) {
  return static_cast<uint64_t>(column) < static_cast<uint64_t>(m) ? static_cast<int>(column)
                                                                  : otherwise;
}

CUTE_HOST_DEVICE Row load_row(const Problem& p, int i) {
  const Rules& rules = p.rules;
  if (i >= p.n) return {kOutside, kInfinity, 0};
  return {rules.labels == nullptr ? rules.first_row + i
                                  : column_or(rules.labels[i], p.m, kNowhere),
          rules.row_limit == nullptr ? kInfinity : rules.row_limit[i],
          rules.query_ids == nullptr ? 0 : rules.query_ids[i]};
}

// Reads a thread's columns at offsets from the first. Addresses that differ by constants take no
// registers.
struct ColumnReader {
  const int64_t *owners, *ids;
  const float* limits;
  int first, count;

  CUTE_HOST_DEVICE ColumnReader(const Problem& p, int j)
      : owners(p.rules.owners == nullptr ? nullptr : p.rules.owners + j),
        ids(p.rules.target_ids == nullptr ? nullptr : p.rules.target_ids + j),
        limits(p.rules.column_limit == nullptr ? nullptr : p.rules.column_limit + j),
        first(j),
        count(p.m - j) {}

  CUTE_HOST_DEVICE Column operator()(int offset) const {
    const int j = first + offset;
    if (offset >= count) return {j, j, kInfinity, 0};
    return {j, owners == nullptr ? j : column_or(owners[offset], first + count, kNobody),
            limits == nullptr ? kInfinity : limits[offset], ids == nullptr ? 0 : ids[offset]};
  }
};

// Whether a pair lies inside the matrix and is no positive.
CUTE_HOST_DEVICE bool negative(const Problem& p, const Row& row, int column) {
  return column != row.label && row.label != kOutside && column < p.m;
}

// A pair's logits in both directions, and whether it counts there as a negative. Other orders of
// the conditions cost some kernels more instructions, or registers.
CUTE_HOST_DEVICE Logits logits(const Problem& p, float scale, float similarity, const Row& row,
                               const Column& column) {
  const Rules& rules = p.rules;
  const bool own = column.owner == row.label;
  const bool weighted =
      rules.hardness == Hardness::all || own == (rules.hardness == Hardness::hard_negatives);
  const bool duplicate = rules.query_ids != nullptr && row.id == column.id;
  const bool counts = negative(p, row, column.index) && !duplicate;
  const bool in_row = counts && (own || !(similarity > row.limit));
  const bool in_column = counts && (own || !(similarity > column.limit));
  return {{similarity * (weighted ? scale + rules.alpha : scale), in_row},
          {similarity * (weighted ? scale + rules.target_alpha : scale), in_column}};
}

// Whether a pair has the same logit in both directions.
CUTE_HOST_DEVICE bool shared_logits(const Rules& rules) {
  return rules.row_limit == nullptr && rules.alpha == rules.target_alpha;
}

// Whether, in addition, every pair but a positive counts and has the same weight.
CUTE_HOST_DEVICE bool uniform_logits(const Rules& rules) {
  return shared_logits(rules) && rules.owners == nullptr && rules.query_ids == nullptr;
}

// The factor of every similarity under uniform logits. No row has mined negatives then.
CUTE_HOST_DEVICE float uniform_scale(const Rules& rules, float scale) {
  return rules.hardness == Hardness::hard_negatives ? scale : scale + rules.alpha;
}

}  // namespace llave
