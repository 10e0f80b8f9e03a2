// The rows' losses, and the gradients of their weighted sum with respect to the log-sum-exps.
#pragma once

#include "pairs.h"

namespace llave {

// log(1 + exp(x)). NaN stays NaN.
CUTE_HOST_DEVICE float softplus(float x) {
  return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));
}

CUTE_HOST_DEVICE float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

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
  const float *positive, *query_lse, *target_lse;      // (n,), (n,), (m,)
  float weight;                                        // of a row's loss
  float *total, *gain;                                 // ()
  float *d_positive, *d_query_lse, *d_target_lse;      // (n,), (n,), (m,); the last is set to 0

  // The part of row i. Writes the row's slopes.
  CUTE_HOST_DEVICE LossPart row(int i) const {
    const Rules& rules = problem.rules;
    const float row = query_lse[i] - positive[i];
    if (!rules.symmetric) {
      const float slope = weight * sigmoid(row);
      d_query_lse[i] = slope;
      d_positive[i] = -slope;
      return {softplus(row), size(slope), size(slope), 0.0f};
    }
    const int label =
        rules.labels == nullptr ? i : column_or(rules.labels[i], problem.m, kNowhere);
    // Without a label, the row's log-sum-exp is NaN already.
    const float column = label == kNowhere ? row : target_lse[label] - positive[i];
    const float row_slope = 0.5f * weight * sigmoid(row);
    const float column_slope = 0.5f * weight * sigmoid(column);
    d_query_lse[i] = row_slope;
    d_positive[i] = -(row_slope + column_slope);
    if (label != kNowhere) d_target_lse[label] = column_slope;
    return {0.5f * (softplus(row) + softplus(column)), size(row_slope + column_slope),
            size(row_slope), size(column_slope)};
  }

  CUTE_HOST_DEVICE void finish(LossPart all) const {
    *total = weight * all.loss;
    *gain = gain_for(problem.logit_scale() * (all.d_positive + all.d_row + all.d_column));
  }

  // `products.gain`: the power of two that brings the largest possible |dS| to at most 2^15.
  CUTE_HOST_DEVICE static float gain_for(float bound) {
    constexpr float kSmallest = 7.8886091e-31f;  // 2^-100
    const float inside = fminf(fmaxf(bound, kSmallest), 1.0f / kSmallest);
    return exp2f(floorf(15.0f - log2f(inside)));
  }

 private:
  CUTE_HOST_DEVICE static float size(float slope) {
    return fabsf(slope) < kInfinity ? fabsf(slope) : 0.0f;
  }
};

}  // namespace llave
