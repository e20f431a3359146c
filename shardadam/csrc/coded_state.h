// State in fewer bytes: its codes, and the rule for elements whose state is coded.
//
// docs/low_memory.md defines the formats and derives their bounds; kernels/coded_state.py is the
// same in torch operations. As in adam_update.h every operation is one correctly rounded IEEE
// operation in a fixed order, here in float: what a code can't hold need not be computed, and a
// float divides in a fraction of a double's time.
#pragma once

#include "adam_update.h"
#include "formats.h"
#include "random_bits.h"

namespace shardadam {

// Coefficients in float. What is near 1 is held by its distance from 1, which a float has to 24
// bits: 1 - 1e-7 * weight_decay would be 1.
struct Single {
  float grad_factor;
  float l2;
  float forget1;         // 1 - beta1
  float forget2;         // 1 - beta2
  float grad_to_update;  // of the gradient after grad_factor
  float exp_avg_to_update;
  float epsilon;
  float decay;   // 1 - keep
  float stalls;  // codes of the ratio below this would not decay if they were rounded to nearest
};

SHARDADAM_FN Single single_of(const Coefficients& c) {
  const bool folded = c.grad_to_update != 0 && c.l2 == 0;
  return {float(c.grad_factor),
          float(c.l2),
          float(1.0 - c.beta1),
          float(1.0 - c.beta2),
          float(folded ? c.grad_to_update / c.grad_factor : c.grad_to_update),
          float(c.exp_avg_to_update),
          float(c.epsilon),
          float(1.0 - c.keep),
          float(0.5 / (1.0 - c.beta1))};
}

// ---- the rule -----------------------------------------------------------------------------------

constexpr float kLargestGrad = 0x1p60f;
constexpr float kLargestSquare = 0x1p126f;
constexpr float kLeastDivisor = 0x1p-80f;  // less than any root that is not 0

// Of numbers that are not negative, whose bits are in their order.
SHARDADAM_FN float larger(float left, float right) {
  const uint32 a = bits_of(left), b = bits_of(right);
  return float_of(a > b ? a : b);
}

SHARDADAM_FN float size_of(float value) { return float_of(bits_of(value) & 0x7fffffffu); }

SHARDADAM_FN bool is_finite(float value) { return value - value == 0; }

// The gradient after its factor and L2 decay. Where it is not finite the state gets 0, and the
// param becomes NaN. A caller that knows that nothing has to be checked may say so: a gradient of
// at most kLargestGrad, and without kL2.
template <bool kL2, bool kChecked>
SHARDADAM_FN float effective_grad(float given, float param, const Single& c) {
  if (!kChecked) return c.grad_factor * given;
  float grad = c.grad_factor * (is_finite(given) ? given : 0.0f);
  if (kL2) {
    grad = grad + c.l2 * param;
    grad = grad == grad ? grad : 0.0f;
  }
  grad = grad < -kLargestGrad ? -kLargestGrad : grad;
  return grad > kLargestGrad ? kLargestGrad : grad;
}

// Leaves in `exp_avg` what can be stored: where the square is 0, so is it.
template <bool kChecked>
SHARDADAM_FN void update_moments(float& exp_avg, float& square, float grad, const Single& c) {
  exp_avg = (exp_avg - c.forget1 * exp_avg) + c.forget1 * grad;
  square = (square - c.forget2 * square) + c.forget2 * (grad * grad);
  if (kChecked) square = square > kLargestSquare ? kLargestSquare : square;
  exp_avg = square > 0 ? exp_avg : 0.0f;
}

// `divisor` is the root of the square, or of its maximum.
template <bool kNesterov, bool kChecked>
SHARDADAM_FN float updated_param(float param, float given, float grad, float exp_avg, float square,
                                 float divisor, const Single& c) {
  float numerator = c.exp_avg_to_update * exp_avg;
  if (kNesterov) numerator = numerator + c.grad_to_update * (square > 0 ? grad : 0.0f);
  const float change = numerator / (larger(divisor, kLeastDivisor) + c.epsilon);
  const float updated = param - (change + c.decay * param);
  return !kChecked || is_finite(given) ? updated : float_of(0x7fc00000u);
}

// ---- numbers ------------------------------------------------------------------------------------

// The least bf16 that is not less than `value`, which is not negative.
SHARDADAM_FN uint16 bf16_up(float value) { return uint16((bits_of(value) + 0xffffu) >> 16); }

// One of the two nearest bf16 of `value` (not negative), 0 only for 0.
SHARDADAM_FN uint16 stochastic_bf16(float value, uint32 random16) {
  const uint32 bits = (bits_of(value) + random16) >> 16;
  return uint16(value > 0 && bits < 1 ? 1 : bits);
}

// ---- codes of the root --------------------------------------------------------------------------
// A block's scale is the least bf16 that no code exceeds. Coding is stochastic (`random`: 16 bits),
// and only 0 has the code 0. A maximum's code never decodes to less than the maximum.

// 1 for what is not 0, unless it is more.
SHARDADAM_FN int at_least(float root, int code) {
  const uint32 bits = bits_of(root);
  const int least = int(bits < 1u ? bits : 1u);
  return code > least ? code : least;
}

// 16 bits: the exponent, counted down from the scale's, and 11 bits of the significand, so that a
// code is the middle of a float's bits.
struct Root16 {
  using Storage = uint16;
  static constexpr int kShift = 12;
  static SHARDADAM_FN uint16 scale(float largest) { return bf16_up(largest); }
  static SHARDADAM_FN uint16 scale_of_maxima(float largest) { return bf16_up(largest); }

  int zero;  // the bits that a code counts from; more than 0's, unless all of the block is 0
  explicit SHARDADAM_FN Root16(uint16 scale)
      : zero(scale ? int(uint32(scale) << 16) - (0xffff << kShift) : 0) {}
  SHARDADAM_FN float decode(int code) const {
    return float_of(code ? uint32(zero + (code << kShift)) : 0u);
  }
  SHARDADAM_FN int code(float root, uint32 random) const {
    return at_least(root, (int(bits_of(root)) - zero + int(random >> 4)) >> kShift);
  }
  SHARDADAM_FN int code_of_maximum(float root) const {
    return at_least(root, (int(bits_of(root)) - zero + 0xfff) >> kShift);
  }
};

// 8 bits: scale * (code / 256)^2, the fourth root of the square in equal steps.
struct Root8 {
  using Storage = uint8;
  static constexpr float kCodes = 256;
  static SHARDADAM_FN float enough(float largest) { return largest * (1.0f + 3.0f / kCodes); }
  static SHARDADAM_FN uint16 scale(float largest) { return bf16_up(enough(largest)); }
  // A power of two, since each change of it rounds all of a block's maxima up once more.
  static SHARDADAM_FN uint16 scale_of_maxima(float largest) {
    return uint16(((bits_of(enough(largest)) + 0x7fffffu) & 0x7f800000u) >> 16);
  }

  float unit, per_root;
  explicit SHARDADAM_FN Root8(uint16 scale) {
    const float value = float_of_bf16(scale);
    unit = value * (1.0f / (kCodes * kCodes));
    per_root = value > 0 ? kCodes / sqrtf(value) : 0.0f;
  }
  SHARDADAM_FN float decode(int code) const { return (float(code) * float(code)) * unit; }
  // A step is so wide that the square, a code's fourth power, would grow by rounding: the chance of
  // the upper code is such that the square's expected value is right to first order.
  SHARDADAM_FN int code(float root, uint32 random) const {
    const float place = sqrtf(root) * per_root;
    const int whole = int(place);
    const float below = float(whole), beyond = place - below;
    const float chance = float(int(random)) * 0x1p-16f;
    const bool up = chance * (below + 1.5f) < beyond * (below + 1.5f * beyond);
    return at_least(root, whole + (up ? 1 : 0));
  }
  SHARDADAM_FN int code_of_maximum(float root) const {
    const int code = int(sqrtf(root) * per_root + 0.5f);
    return code + (decode(code) < root ? 1 : 0);
  }
};

// ---- codes of the ratio of exp_avg to the root: scale * code / 127 ------------------------------

struct Ratio {
  static constexpr float kCodes = 127;
  static constexpr float kLeast = 0x1p-100f;  // a block whose ratios are smaller has no exp_avg
  static SHARDADAM_FN uint16 scale(float largest) {
    const uint16 scale = bf16_up(largest * (1.0f + 0x1p-14f));
    return float_of_bf16(scale) >= kLeast ? scale : uint16(0);
  }
  static SHARDADAM_FN float of(float exp_avg, float root) {
    return exp_avg / larger(root, kLeastDivisor);
  }

  float unit, per_ratio;
  explicit SHARDADAM_FN Ratio(uint16 scale) {
    const float value = float_of_bf16(scale);
    unit = value * (1.0f / kCodes);
    per_ratio = value > 0 ? kCodes / value : 0.0f;
  }
  SHARDADAM_FN float decode(int code, float root) const { return root * (float(code) * unit); }
  // To nearest, but stochastically below `stalls`. `random`: 16 bits, which become the last ones of
  // a float in [128, 129); so what is cut off is never negative.
  SHARDADAM_FN int code(float ratio, uint32 random, float stalls) const {
    const float place = ratio * per_ratio;
    const float offset = float_of(0x43000000u | random);
    return int(place + (size_of(place) < stalls ? offset : 128.5f)) - 128;
  }
};

// ---- masters ------------------------------------------------------------------------------------

// The bits of `master`, the last kBits of them rounded away by as many random ones. What is finite
// stays finite, and a NaN becomes a quiet one whose lower half is 0.
template <int kBits>
SHARDADAM_FN uint32 stochastic_bits(float master, uint32 random) {
  constexpr uint32 kRounded = (1u << kBits) - 1;
  const uint32 bits = bits_of(master);
  uint32 rounded = (bits + (random >> (32 - kBits))) & ~kRounded;
  rounded = (rounded & 0x7fffffffu) >= 0x7f800000u ? bits & ~kRounded : rounded;
  return is_nan_bits(bits) ? (bits | 0x400000u) & 0xffff0000u : rounded;
}

// The split master with an 8-bit remainder: 24 bits of 32. (`Split` in formats.h has all 32.)
struct Split8 {
  uint16 param;
  int8 remainder;
};

SHARDADAM_FN Split8 split8_of(float master, uint32 random) {
  const uint32 bits = stochastic_bits<8>(master, random);
  return {uint16((bits + 0x8000u) >> 16), int8(uint8(bits >> 8))};
}

SHARDADAM_FN float master_of(Split8 split) {
  return float_of((uint32(split.param) << 16) + (uint32(int(split.remainder)) << 8));
}

}  // namespace shardadam
