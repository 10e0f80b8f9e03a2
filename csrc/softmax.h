// Sums of exponentials that carry their own shift.
//
// Logits keep base e until the shift is subtracted. Changing the base first would round large ones.
#pragma once

#include <cmath>
#include <limits>

#include "cute/config.hpp"

namespace llave {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr float kLog2E = 1.4426950408889634f;

CUTE_HOST_DEVICE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#else
  return std::exp2(x);
#endif
}

CUTE_HOST_DEVICE float exponential(float x) {
  return power_of_two(x * kLog2E);
}

// 1 / x for a normal number.
CUTE_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// log(1 + x) for 0 <= x <= 1, with the relative error of a few roundings. The polynomial is the best
// one of its degree for log(1 + x) / x.
CUTE_HOST_DEVICE float log_of_one_plus(float x) {
  constexpr float kCoefficients[] = {0.99999994f, -0.499994934f, 0.333190978f,
                                     -0.24842982f, 0.191060051f, -0.136632428f,
                                     0.0782259107f, -0.0295052137f, 0.00523268804f};
  float sum = kCoefficients[8];
  CUTE_UNROLL
  for (int k = 7; k >= 0; --k) sum = fmaf(sum, x, kCoefficients[k]);
  return x * sum;
}

// 0 in place of -infinity, so that (-infinity) - shift stays -infinity where nothing is summed.
CUTE_HOST_DEVICE float finite(float shift) {
  return shift == -kInfinity ? 0.0f : shift;
}

// The sum of exp(z - shift) over some logits z. The shift is at most 46 above the largest logit. No
// logit is more than 20 above the shift. Without logits, shift and sum are (-infinity, 0).
struct ShiftedSum {
  float shift, sum;

  CUTE_HOST_DEVICE static ShiftedSum nothing() { return {-kInfinity, 0.0f}; }

  CUTE_HOST_DEVICE void add(ShiftedSum other) {
    const float highest = fmaxf(shift, other.shift);
    const float common = finite(highest);
    sum = sum * exponential(shift - common) + other.sum * exponential(other.shift - common);
    shift = highest;
  }

  CUTE_HOST_DEVICE float log_sum_exp() const { return finite(shift) + logf(sum); }
};

}  // namespace llave
