// The pair rules of one call as plain values. `llave_kernels/rules.py` explains them.
#pragma once

#include <cstdint>

#include "cute/config.hpp"

namespace llave {

// Which negatives carry the weight. in_batch: those that other rows own. hard_negatives: the row's
// own mined ones. all: both. within: for pairs of one side, where the row's own do not count.
#define LLAVE_HARDNESS_MODES(mode) mode(in_batch) mode(hard_negatives) mode(all) mode(within)

#define LLAVE_NUMBER(mode) mode,
enum class Hardness : int { LLAVE_HARDNESS_MODES(LLAVE_NUMBER) };
#undef LLAVE_NUMBER

#define LLAVE_NAME(mode) #mode,
constexpr const char* kHardnessModes[] = {LLAVE_HARDNESS_MODES(LLAVE_NAME)};
#undef LLAVE_NAME

struct Rules {
  const int64_t* labels;      // (n,) column of each row's positive, or null: row i's is column i
  const int64_t* owners;      // (m,), or null: every column is its own owner
  const int64_t* query_ids;   // (n,), null without ids
  const int64_t* target_ids;  // (m,), null without ids
  const float* row_limit;     // (n,) similarity above which a negative is left out, or null
  const float* column_limit;  // (m,) the same in the target direction, or null
  const float* query_bias;    // (n,) what each logit of the row has added, or null
  const float* target_bias;   // (m,) the same of the column, or null
  float alpha, target_alpha;
  Hardness hardness;
  bool symmetric;  // whether the target direction is computed
  int first_row;   // the number of row 0 in the whole batch

  CUTE_HOST_DEVICE bool biased() const { return query_bias != nullptr || target_bias != nullptr; }

  // The rules of the rows from `start` on.
  Rules rows(int start) const {
    Rules part = *this;
    part.first_row += start;
    if (labels != nullptr) part.labels += start;
    if (query_ids != nullptr) part.query_ids += start;
    if (row_limit != nullptr) part.row_limit += start;
    if (query_bias != nullptr) part.query_bias += start;
    return part;
  }
};

}  // namespace llave
