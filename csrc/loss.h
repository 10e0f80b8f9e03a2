// The rows' losses, and the gradients of their weighted sum with respect to the log-sum-exps.
#pragma once

#include "pairs.h"

namespace llave {

// log(1 + exp(x)) and its derivative, to the last digits of a small loss too. NaN stays NaN.
struct Softplus {
  float value, slope;

  CUTE_HOST_DEVICE explicit Softplus(float x) {
    constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
    const float size = fabsf(x) > 200.0f ? 200.0f : fabsf(x);  // exp(-200) is 0 in float32
    // exp(-size) = 2^-whole exp(-rest). Rounding size * log2(e) would cost its last digits.
    const float whole = floorf(size * kLog2E);
    const float rest = fmaf(-whole, kLn2Low, fmaf(-whole, kLn2High, size));
    const float e = power_of_two(-whole) * exponential(-rest);
    value = (x > 0.0f ? x : 0.0f) + log_of_one_plus(e);
    slope = (x < 0.0f ? e : 1.0f) / (1.0f + e);
  }
};

// What a row, or a whole batch, adds to the loss. The largest slopes ignore what is not finite.
struct LossPart {
  float loss, d_positive, d_row, d_column;

  CUTE_HOST_DEVICE static LossPart nothing() { return {0.0f, 0.0f, 0.0f, 0.0f}; }

  CUTE_HOST_DEVICE void add(LossPart other) {
    loss += other.loss;
    d_positive = fmaxf(d_positive, other.d_positive);
    d_row = fmaxf(d_row, other.d_row);
    d_column = fmaxf(d_column, other.d_column);
  }
};

struct LossCall {
  Problem problem;
  const float *positive, *query_lse, *target_lse;  // (n,), (n,), (m,)
  float weight;                                    // of a row's loss
  float *total, *gain;                             // ()
  float *d_positive, *d_query_lse, *d_target_lse;  // (n,), (n,), (m,); the last is set to 0

  // The part of row i. Writes the row's slopes.
  CUTE_HOST_DEVICE LossPart row(int i) const {
    const Rules& rules = problem.rules;
    const Softplus row(query_lse[i] - positive[i]);
    if (!rules.symmetric) {
      const float slope = weight * row.slope;
      d_query_lse[i] = slope;
      d_positive[i] = -slope;
      return {row.value, size(slope), size(slope), 0.0f};
    }
    const int label = rules.labels == nullptr ? i : column_or(rules.labels[i], problem.m, kNowhere);
    // Without a label, the row's positive is NaN.
    const Softplus column((label == kNowhere ? query_lse[i] : target_lse[label]) - positive[i]);
    const float row_slope = 0.5f * weight * row.slope;
    const float column_slope = 0.5f * weight * column.slope;
    d_query_lse[i] = row_slope;
    d_positive[i] = -(row_slope + column_slope);
    if (label != kNowhere) d_target_lse[label] = column_slope;
    return {0.5f * (row.value + column.value), size(row_slope + column_slope), size(row_slope),
            size(column_slope)};
  }

  CUTE_HOST_DEVICE void finish(LossPart all) const {
    *total = weight * all.loss;
    *gain = gain_for(problem.logit_scale() * (all.d_positive + all.d_row + all.d_column));
  }

  // `products.gain`: the power of two that brings the largest possible |dS| to at most 2^15.
  CUTE_HOST_DEVICE static float gain_for(float bound) {
    constexpr float kSmallest = 7.8886091e-31f;  // 2^-100
    const float inside = fminf(fmaxf(bound, kSmallest), 1.0f / kSmallest);
    return power_of_two(floorf(15.0f - kLog2E * logf(inside)));
  }

 private:
  CUTE_HOST_DEVICE static float size(float slope) {
    return fabsf(slope) < kInfinity ? fabsf(slope) : 0.0f;
  }
};

}  // namespace llave
