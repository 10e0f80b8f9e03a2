// Which pairs count and how they are weighted. These are the rules of `llave_kernels/rules.py` for
// one pair. tile_pairs.h applies them to a tile.
#pragma once

#include "problem.h"

namespace llave {

// What the rules read of a row and of a column. A row beyond the edge has the label `kOutside`. A
// label that is no column becomes `kNowhere`. An owner that is no column becomes `kNobody`. They
// equal no column and not each other. Without ids, no row has the id of a column.
struct Row {
  int label;
  float limit, bias;
  int64_t id;
};

struct Column {
  int owner;
  float limit, bias;
  int64_t id;
};

constexpr int kOutside = -1, kNowhere = -2, kNobody = -3;
constexpr int64_t kElsewhere = -1;  // `ELSEWHERE` of rules.py, a label in memory
constexpr int64_t kNoRowId = INT64_MIN, kNoColumnId = INT64_MIN + 1;

// A 64-bit column number as an int, or `otherwise` if there is no such column.
CUTE_HOST_DEVICE int column_or(int64_t column, int m, int otherwise) {
  return static_cast<uint64_t>(column) < static_cast<uint64_t>(m) ? static_cast<int>(column)
                                                                  : otherwise;
}

// Without a bias, nothing is added.
CUTE_HOST_DEVICE float bias_at(const float* bias, int64_t k) {
  return bias == nullptr ? 0.0f : bias[k];
}

CUTE_HOST_DEVICE Row load_row(const Problem& p, int i) {
  const Rules& rules = p.rules;
  if (i >= p.n) return {kOutside, kInfinity, 0.0f, kNoRowId};
  return {rules.labels == nullptr ? rules.first_row + i : column_or(rules.labels[i], p.m, kNowhere),
          rules.row_limit == nullptr ? kInfinity : rules.row_limit[i], bias_at(rules.query_bias, i),
          rules.query_ids == nullptr ? kNoRowId : rules.query_ids[i]};
}

CUTE_HOST_DEVICE Column load_column(const Problem& p, int j) {
  const Rules& rules = p.rules;
  if (j >= p.m) return {j, kInfinity, 0.0f, kNoColumnId};
  return {rules.owners == nullptr ? j : column_or(rules.owners[j], p.m, kNobody),
          rules.column_limit == nullptr ? kInfinity : rules.column_limit[j],
          bias_at(rules.target_bias, j),
          rules.target_ids == nullptr ? kNoColumnId : rules.target_ids[j]};
}

// A pair is the row's own if the row's label is the column's owner. These factors turn the
// similarity of an own pair, or of another one, into its logits of both directions.
struct Factors {
  float row, column;

  CUTE_HOST_DEVICE Factors(const Rules& rules, float scale, bool own) : row(scale), column(scale) {
    if (rules.hardness == Hardness::all || own == (rules.hardness == Hardness::hard_negatives)) {
      row += rules.alpha;
      column += rules.target_alpha;
    }
  }
};

// A pair's logit in one direction, -infinity if it does not count there. A pair counts in neither
// direction if its column is the row's positive, if its ids are equal, if it is the row's own and
// the hardness is `within`, or beyond the edge of the matrix. Its similarity is then given as
// -infinity. The margin leaves a pair out of the direction whose limit it exceeds, unless it is the
// row's own.
CUTE_HOST_DEVICE float logit(float similarity, bool own, float limit, float own_factor,
                             float other_factor) {
  if (!own && similarity > limit) return -kInfinity;
  return similarity * (own ? own_factor : other_factor);
}

}  // namespace llave
