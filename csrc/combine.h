// Turns the tiles' sums of exponentials into log-sum-exps, and completes the positives' logits.
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
  const float* bias;  // (length,) what is added to the log-sum-exps, or null
  // Given for rows, null for columns. Tiles write it without biases. If a label is no column, no
  // tile has written the row's positive. The positive is then NaN. So is the log-sum-exp, unless
  // the label says that the positive is elsewhere.
  float* positive;
  Rules rules;
  int m;

  // Adds the parts in their order, whatever the launch.
  CUTE_HOST_DEVICE void combine(int64_t index) const {
    ShiftedSum total = state == nullptr || first ? ShiftedSum::nothing() : state[index];
    for (int part = 0; part < count; ++part) total.add(parts[part * length + index]);
    if (state != nullptr) state[index] = total;
    lse[index] = total.log_sum_exp() + bias_at(bias, index);
    if (positive == nullptr) return;
    const int64_t label =
        rules.labels == nullptr ? rules.first_row + index : rules.labels[index];
    if (column_or(label, m, kNowhere) != kNowhere) {
      positive[index] += bias_at(rules.query_bias, index) + bias_at(rules.target_bias, label);
      return;
    }
    positive[index] = std::numeric_limits<float>::quiet_NaN();
    if (label != kElsewhere) lse[index] = positive[index];
  }
};

}  // namespace llave
