// From the tiles' sums of exponentials to log-sum-exps.
#pragma once

#include "softmax.h"

namespace llave {

struct Combination {
  const ShiftedSum* parts;  // (count, length)
  int count;
  int64_t length;
  ShiftedSum* state;  // (length,) the sums of earlier strips, updated; null where there are none
  bool first;         // whether `state` is still empty
  float* lse;         // (length,)

  // In the order of the parts, whatever the launch.
  CUTE_HOST_DEVICE void combine(int64_t index) const {
    ShiftedSum total = state == nullptr || first ? ShiftedSum::nothing() : state[index];
    for (int part = 0; part < count; ++part) total.add(parts[part * length + index]);
    if (state != nullptr) state[index] = total;
    lse[index] = total.log_sum_exp();
  }
};

}  // namespace llave
