// The pair rules of one call: `llave_kernels/rules.py` as plain values.
#pragma once

#include <cstdint>

namespace llave {

// Which negatives carry the weight: the row's own, those that other rows own.
struct HardnessMode {
  const char* name;
  bool own, others;
};

constexpr HardnessMode kHardnessModes[] = {
    {"in_batch", false, true}, {"hard_negatives", true, false}, {"all", true, true}};

struct Rules {
  const int64_t* labels;      // (n,) the column of each row's positive, null: row i's is column i
  const int64_t* owners;      // (m,) or null: every column is its own
  const int64_t* query_ids;   // (n,), null without ids
  const int64_t* target_ids;  // (m,), null without ids
  const float* row_limit;     // (n,) similarity above which a negative is left out, or null
  const float* column_limit;  // (m,) the same in the target direction, or null
  float alpha, target_alpha;
  bool weights_own, weights_others;  // of the hardness mode
  bool symmetric;                    // whether the target direction is computed
  int first_row;                     // where row 0 lies in the whole batch

  // The rules of the rows from `start` on.
  Rules rows(int start) const {
    Rules part = *this;
    part.first_row += start;
    if (labels != nullptr) part.labels += start;
    if (query_ids != nullptr) part.query_ids += start;
    if (row_limit != nullptr) part.row_limit += start;
    return part;
  }
};

}  // namespace llave
