// Turns the tiles' sums of exponentials into log-sum-exps.
#pragma once

#include "pairs.h"

namespace llave {

struct Combination {
  const ShiftedSum* parts;  // (count, length)
  int count;
  int64_t length;
  ShiftedSum* state;  // (length,) sums of earlier strips, updated here; null for rows
  bool first;         // whether `state` is still empty
  float* lse;         // (length,)
  // Given for rows, null for columns. If a label is no column, no tile has written the row's
  // positive. The positive is then NaN. So is the log-sum-exp, unless the label says that the
  // positive is elsewhere.
  const int64_t* labels;
  int m;
  float* positive;

  // Adds the parts in their order, whatever the launch.
  CUTE_HOST_DEVICE void combine(int64_t index) const {
    ShiftedSum total = state == nullptr || first ? ShiftedSum::nothing() : state[index];
    for (int part = 0; part < count; ++part) total.add(parts[part * length + index]);
    if (state != nullptr) state[index] = total;
    lse[index] = total.log_sum_exp();
    if (labels == nullptr || column_or(labels[index], m, kNowhere) != kNowhere) return;
    positive[index] = std::numeric_limits<float>::quiet_NaN();
    if (labels[index] != kElsewhere) lse[index] = positive[index];
  }
};

}  // namespace llave
