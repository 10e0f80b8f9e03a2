// What one call computes, as plain values that a kernel takes by copy. Every pointer is to device
// memory.
#pragma once

#include <cstdint>

#include "softmax.h"

namespace llave {

enum class Type : int { float32, bfloat16, float16 };
enum class Hardness : int { in_batch, hard_negatives, all };

struct Problem {
  Type type;
  const void* query;   // (n, d), rows `query_stride` elements apart
  const void* target;  // (m, d)
  int64_t query_stride, target_stride;
  int n, m, d;
  const float* scale;         // logit scale, ()
  const int64_t* labels;      // (n,) the column of each row's positive
  const int64_t* owners;      // (m,) or null: every column is its own
  const int64_t* query_ids;   // (n,), null without ids
  const int64_t* target_ids;  // (m,), null without ids
  const float* row_limit;     // (n,) similarity above which a negative is left out, or null
  const float* column_limit;  // (m,) the same in the target direction, or null
  float alpha, target_alpha;
  Hardness hardness;
  bool symmetric;  // whether the target direction is computed

  // The problem of rows `start` to `stop` alone.
  Problem rows(int start, int stop) const {
    Problem part = *this;
    const int64_t bytes = type == Type::float32 ? 4 : 2;
    part.n = stop - start;
    part.query = static_cast<const char*>(query) + start * query_stride * bytes;
    part.labels += start;
    if (query_ids != nullptr) part.query_ids += start;
    if (row_limit != nullptr) part.row_limit += start;
    return part;
  }
};

struct ForwardOutputs {
  ShiftedSum* row_parts;     // (tiles across, n)
  ShiftedSum* column_parts;  // (tiles down, m), null in one direction
  float* positive;           // (n,) logits of the positives
};

struct BackwardOutputs {
  const float *row_lse, *column_lse;                   // (n,), (m,): the log-sum-exps
  const float *d_positive, *d_row_lse, *d_column_lse;  // (n,), (n,), (m,): upstream gradients
  const float* gain;                                   // (), a power of two on dS, or null for 1
  void* ds;  // (n, pitch), the inputs' type, pitch a multiple of 8 not below m
  int64_t pitch;
};

}  // namespace llave
