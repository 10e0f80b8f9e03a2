// From the tiles' sums of exponentials to log-sum-exps.
#pragma once

#include "pairs.h"

namespace llave {

struct Combination {
  const ShiftedSum* parts;  // (count, length)
  int count;
  int64_t length;
  ShiftedSum* state;  // (length,) the sums of earlier strips, updated; null where there are none
  bool first;         // whether `state` is still empty
  float* lse;         // (length,)
  // Of rows, else null. A label that is no column makes a row's outputs NaN: no tile has written
  // its positive.
  const int64_t* labels;
  int m;
  float* positive;

  // In the order of the parts, whatever the launch.
  CUTE_HOST_DEVICE void combine(int64_t index) const {
    ShiftedSum total = state == nullptr || first ? ShiftedSum::nothing() : state[index];
    for (int part = 0; part < count; ++part) total.add(parts[part * length + index]);
    if (state != nullptr) state[index] = total;
    lse[index] = total.log_sum_exp();
    if (labels != nullptr && column_or(labels[index], m, kNowhere) == kNowhere) {
      lse[index] = positive[index] = std::numeric_limits<float>::quiet_NaN();
    }
  }
};

}  // namespace llave
