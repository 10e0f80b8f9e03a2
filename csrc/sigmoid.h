// The outputs of the sigmoid loss, as plain values that a kernel takes by copy.
#pragma once

#include "problem.h"

namespace llave {

struct SigmoidOutputs {
  const float* bias;     // ()
  const float* weights;  // (n,) upstream gradients of the rows' losses, or null: 1
  const float* gain;     // (), a power of two for dS, or null: 1
  void* ds;              // (n, pitch) in the inputs' type, or null: no gradients
  int64_t pitch;         // a multiple of 8 and at least m
  float* loss_parts;     // (row parts, n)
  float* sums;           // (sums, 2): parts of the gradients of scale and bias
};

// How many parts a launch writes.
struct SigmoidParts {
  int64_t row_parts, sums;
};

}  // namespace llave
