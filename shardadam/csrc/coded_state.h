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

// Coefficients in float: betas as floats, what is new weighted with exactly the rest to 1. What is
// nearer to 1 is held by its distance from 1, which a float has to 24 bits: 1 - 1e-7 *
// weight_decay would be 1. As in Coefficients, the gradient's factor is folded into what the
// gradient is multiplied by anyway, unless L2 decay comes between.
struct Single {
  float grad_factor;  // with L2 decay
  float l2;
  float largest_grad;  // a gradient is limited to it, after L2 decay
  float beta1;
  float beta2;
  float grad_to_exp_avg;
  float grad_to_root;  // its square: to exp_avg_sq
  float grad_to_update;
  float exp_avg_to_update;
  float epsilon;
  float decay;   // 1 - keep
  float stalls;  // codes of the ratio below this would not decay if they were rounded to nearest
};

constexpr float kLargestGrad = 0x1p60f;
constexpr float kLargestFloat = 0x1.fffffep127f;

// A beta as a float, that is less than 1 as it is.
SHARDADAM_FN float single_beta(double beta) {
  const float largest = 0x1.fffffep-1f;
  return beta < double(largest) ? float(beta) : largest;
}

SHARDADAM_FN Single single_of(const Coefficients& c) {
  const float beta1 = single_beta(c.beta1), beta2 = single_beta(c.beta2);
  const double folded = c.l2 != 0 ? 1 : c.grad_factor;
  const double size = folded < 0 ? -folded : folded;
  const bool limited = double(kLargestGrad) < double(kLargestFloat) * size;
  return {float(c.grad_factor),
          float(c.l2),
          limited ? float(double(kLargestGrad) / size) : kLargestFloat,
          beta1,
          beta2,
          float((1.0 - double(beta1)) * folded),
          float(sqrt(1.0 - double(beta2)) * folded),
          float(c.grad_to_update),
          float(c.exp_avg_to_update),
          float(c.epsilon),
          float(1.0 - c.keep),
          float(0.5 / (1.0 - c.beta1))};
}

// ---- the rule -----------------------------------------------------------------------------------

constexpr float kLargestSquare = 0x1p126f;
constexpr float kLeastDivisor = 0x1p-80f;  // less than any root that is not 0

// The templates below are for one number, or for vectors of them with the same functions and
// operators (vectors_cpu.h).

SHARDADAM_FN float root_of(float value) { return sqrtf(value); }
SHARDADAM_FN int whole_of(float value) { return int(value); }
SHARDADAM_FN float to_float(int value) { return float(value); }
SHARDADAM_FN int to_int(int value) { return value; }
SHARDADAM_FN int to_int(uint32 value) { return int(value); }
SHARDADAM_FN uint32 to_uint(int value) { return uint32(value); }
template <class T>
SHARDADAM_FN T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
template <class T>
SHARDADAM_FN T most(T a, T b) {
  return select(a > b, a, b);
}

// Of numbers that are not negative, whose bits are in their order.
template <class Float>
SHARDADAM_FN Float larger(Float left, Float right) {
  return float_of(most(bits_of(left), bits_of(right)));
}

template <class Float>
SHARDADAM_FN Float size_of(Float value) {
  return float_of(bits_of(value) & 0x7fffffffu);
}

template <class Float>
SHARDADAM_FN auto is_finite(Float value) {
  return value - value == Float(0.0f);
}

// The gradient that the moments get: with L2 decay, if there is any. Where it is not finite they
// get 0, and the param becomes NaN. A caller that knows that nothing has to be checked may say so:
// a gradient of at most half of `largest_grad`, and without kL2.
template <bool kL2, bool kChecked, class Float>
SHARDADAM_FN Float effective_grad(Float given, Float param, const Single& c) {
  if (!kChecked) return given;
  Float grad = select(is_finite(given), given, Float(0.0f));
  if (kL2) {
    grad = c.grad_factor * grad + c.l2 * param;
    grad = select(grad == grad, grad, Float(0.0f));
  }
  grad = select(grad < Float(-c.largest_grad), Float(-c.largest_grad), grad);
  return select(grad > Float(c.largest_grad), Float(c.largest_grad), grad);
}

// Whether elements whose squares are now `largest_square` at most needed no check. Any gradient
// that did, and NaN, makes a larger square. (The checks take a fifth of the time: they are left out
// first, and the rare elements that need them are updated again.)
SHARDADAM_FN bool needed_no_check(float largest_square, const Single& c) {
  const float root = 0.5f * (c.grad_to_root * c.largest_grad);
  return largest_square <= root * root;
}

// Leaves in `exp_avg` what can be stored: where the square is 0, so is it.
template <bool kChecked, class Float>
SHARDADAM_FN void update_moments(Float& exp_avg, Float& square, Float grad, const Single& c) {
  const Float root = c.grad_to_root * grad;
  exp_avg = c.beta1 * exp_avg + c.grad_to_exp_avg * grad;
  square = c.beta2 * square + root * root;
  if (kChecked) square = select(square > Float(kLargestSquare), Float(kLargestSquare), square);
  exp_avg = select(square > Float(0.0f), exp_avg, Float(0.0f));
}

// `square` may be its root, too. `divisor` is the root of the square, or of its maximum.
template <bool kNesterov, bool kChecked, class Float>
SHARDADAM_FN Float updated_param(Float param, Float given, Float grad, Float exp_avg, Float square,
                                 Float divisor, const Single& c) {
  Float numerator = c.exp_avg_to_update * exp_avg;
  if (kNesterov) {
    const Float alive = select(square > Float(0.0f), grad, Float(0.0f));
    numerator = numerator + c.grad_to_update * alive;
  }
  const Float change = numerator / (larger(divisor, Float(kLeastDivisor)) + c.epsilon);
  const Float updated = param - (change + c.decay * param);
  return kChecked ? select(is_finite(given), updated, Float(float_of(0x7fc00000u))) : updated;
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
template <class Float, class Int>
SHARDADAM_FN Int at_least(Float root, Int code) {
  return select(root > Float(0.0f), most(code, Int(1)), Int(0));
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
  template <class Int>
  SHARDADAM_FN auto decode(Int code) const {
    const auto wide = to_int(code);
    return float_of(to_uint(select(wide > 0, zero + (wide << kShift), wide)));
  }
  template <class Float, class Uint>
  SHARDADAM_FN auto code(Float root, Uint random) const {
    return at_least(root, (to_int(bits_of(root)) - zero + to_int(random >> 4)) >> kShift);
  }
  template <class Float>
  SHARDADAM_FN auto code_of_maximum(Float root) const {
    return at_least(root, (to_int(bits_of(root)) - zero + 0xfff) >> kShift);
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
  template <class Int>
  SHARDADAM_FN auto decode(Int code) const {
    return (to_float(code) * to_float(code)) * unit;
  }
  // A step is so wide that the square, a code's fourth power, would grow by rounding: the chance of
  // the upper code is such that the square's expected value is right to first order.
  template <class Float, class Uint>
  SHARDADAM_FN auto code(Float root, Uint random) const {
    const Float place = root_of(root) * per_root;
    const auto whole = whole_of(place);
    const Float below = to_float(whole), beyond = place - below;
    const Float chance = to_float(to_int(random)) * 0x1p-16f;
    const auto up = chance * (below + 1.5f) < beyond * (below + 1.5f * beyond);
    return at_least(root, select(up, whole + 1, whole));
  }
  template <class Float>
  SHARDADAM_FN auto code_of_maximum(Float root) const {
    const auto code = whole_of(root_of(root) * per_root + 0.5f);
    return select(decode(code) < root, code + 1, code);
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
  template <class Float>
  static SHARDADAM_FN Float of(Float exp_avg, Float root) {
    return exp_avg / larger(root, Float(kLeastDivisor));
  }

  float unit, per_ratio;
  explicit SHARDADAM_FN Ratio(uint16 scale) {
    const float value = float_of_bf16(scale);
    unit = value * (1.0f / kCodes);
    per_ratio = value > 0 ? kCodes / value : 0.0f;
  }
  template <class Int, class Float>
  SHARDADAM_FN Float decode(Int code, Float root) const {
    return root * (to_float(code) * unit);
  }
  // To nearest, but stochastically below `stalls`. `random`: 16 bits, which become the last ones of
  // a float in [128, 129); so what is cut off is never negative.
  template <class Float, class Uint>
  SHARDADAM_FN auto code(Float ratio, Uint random, float stalls) const {
    const Float place = ratio * per_ratio;
    const Float offset = float_of(random | 0x43000000u);
    return whole_of(place + select(size_of(place) < Float(stalls), offset, Float(128.5f))) - 128;
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
  return float_of((uint32(split.param) << 16) +
                  (uint32(remainder_of(split.param, split.remainder)) << 8));
}

}  // namespace shardadam
