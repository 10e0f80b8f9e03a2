// The inputs and outputs of one call, as plain values that a kernel takes by copy. Every pointer is
// to device memory.
#pragma once

#include <cstdint>

#include "rules.h"
#include "softmax.h"

namespace llave {

enum class Type : int { float32, bfloat16, float16 };

struct Problem {
  Type type;
  const void* query;   // (n, d), rows `query_stride` elements apart
  const void* target;  // (m, d)
  int64_t query_stride, target_stride;
  int n, m, d;
  const float* scale;  // logit scale, (), or null: it is `scale_value`
  float scale_value;
  Rules rules;

  CUTE_HOST_DEVICE float logit_scale() const { return scale == nullptr ? scale_value : *scale; }

  // The same problem for rows `start` to `stop` only.
  Problem rows(int start, int stop) const {
    Problem part = *this;
    const int64_t bytes = type == Type::float32 ? 4 : 2;
    part.n = stop - start;
    part.query = static_cast<const char*>(query) + start * query_stride * bytes;
    part.rules = rules.rows(start);
    return part;
  }
};

struct Kept {
  float* similarities;  // (n, pitch), or null: nothing is kept. See kept.h
  int64_t pitch;
};

struct ForwardOutputs {
  ShiftedSum* row_parts;     // (tiles across, n)
  ShiftedSum* column_parts;  // (tiles down, m), unused in one direction
  float* positive;           // (n,) logits of the positives
  Kept kept;
};

struct BackwardOutputs {
  const float *query_lse, *target_lse;                   // (n,), (m,): the log-sum-exps
  const float *d_positive, *d_query_lse, *d_target_lse;  // (n,), (n,), (m,): upstream gradients
  const float* gain;                                     // (), a power of two for dS, null for 1
  void* ds;  // (n, pitch) in the inputs' type; pitch is a multiple of 8 and at least m
  int64_t pitch;
  Kept kept;
  // Given if the logit scale learns. `scale_parts` takes a part of its gradient from each warp.
  const float* positive;  // (n,) logits of the positives
  float* scale_parts;
};

}  // namespace llave
