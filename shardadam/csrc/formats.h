// Number formats, as bit conversions that are the same everywhere, and the codes that name them.
#pragma once

#include "portable.h"

namespace shardadam {

// How a param is stored. kBf16Split: bf16 and a 16-bit remainder (8 bits in kBf16Split8).
// kBf16Master, kFp16Master: the param beside an fp32 copy that is its master weight. kBf16Only: no
// master, rounded stochastically. kernels/run.py has the same codes.
enum ParamFormat : int {
  kFloat32,
  kFloat64,
  kBf16Split,
  kBf16Master,
  kFp16Master,
  kBf16Split8,
  kBf16Only
};
// How the moments are stored. kStateFull: in float (double with kFloat64). The others:
// coded_state.h.
enum StateFormat : int { kStateFull, kStateBf16, kStateQ16, kStateQ8 };
enum GradFormat : int { kGradFloat32, kGradFloat64, kGradBf16, kGradFp16 };
enum Flags : int { kFlagAmsgrad = 1, kFlagNesterov = 2, kFlagL2 = 4 };

SHARDADAM_FN uint32 bits_of(float value) {
  uint32 bits;
  copy_bits(bits, value);
  return bits;
}

SHARDADAM_FN float float_of(uint32 bits) {
  float value;
  copy_bits(value, bits);
  return value;
}

SHARDADAM_FN bool is_nan_bits(uint32 bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

SHARDADAM_FN float float_of_bf16(uint16 bits) { return float_of(uint32(bits) << 16); }

// Round to nearest, ties to even; NaN becomes the quiet NaN 0x7fc0, as in torch.
SHARDADAM_FN uint16 bf16_of(float value) {
  const uint32 bits = bits_of(value);
  const uint32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16(is_nan_bits(bits) ? 0x7fc0u : rounded);
}

SHARDADAM_FN float float_of_fp16(uint16 bits) {
  const uint32 sign = uint32(bits & 0x8000u) << 16;
  const uint32 magnitude = bits & 0x7fffu;
  // Shifted into place, the exponent is 112 too small; the multiplication mends that and is exact
  // for normal and subnormal numbers alike. Infinity and NaN (exponent 31) are set apart.
  const uint32 finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32 special = 0x7f800000u | (magnitude << 13);
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

// Round to nearest, ties to even; NaN becomes the quiet NaN 0x7e00 with its sign.
SHARDADAM_FN uint16 fp16_of(float value) {
  const uint32 bits = bits_of(value);
  const uint32 sign = (bits >> 16) & 0x8000u;
  const uint32 magnitude = bits & 0x7fffffffu;
  const uint32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's ten bits, correctly rounded, at the end of the significand.
  const uint32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16(sign | half);
}

// ---- 16-bit values as types ---------------------------------------------------------------------

struct Bf16 {
  uint16 bits;
  static SHARDADAM_FN Bf16 of(float value) { return {bf16_of(value)}; }
};
SHARDADAM_FN float decode(Bf16 value) { return float_of_bf16(value.bits); }

struct Fp16 {
  uint16 bits;
  static SHARDADAM_FN Fp16 of(float value) { return {fp16_of(value)}; }
};
SHARDADAM_FN float decode(Fp16 value) { return float_of_fp16(value.bits); }

SHARDADAM_FN float decode(float value) { return value; }
SHARDADAM_FN double decode(double value) { return value; }

// The type of GradFormat's codes.
template <int kFormat>
struct GradType;
template <>
struct GradType<kGradFloat32> {
  using Type = float;
};
template <>
struct GradType<kGradFloat64> {
  using Type = double;
};
template <>
struct GradType<kGradBf16> {
  using Type = Bf16;
};
template <>
struct GradType<kGradFp16> {
  using Type = Fp16;
};

// The master weight of a 16-bit param beside an fp32 copy. Where the param is no longer what the
// copy was rounded to, somebody wrote it since the last step (a loaded model, a clamp): then the
// param is right and its master is renewed.
template <class Half>
SHARDADAM_FN float current_master(float master, Half param) {
  return Half::of(master).bits == param.bits ? master : decode(param);
}

// ---- the split master ---------------------------------------------------------------------------
// A bf16 param and a 16-bit remainder that together *are* the fp32 master weight:
//   bits(master) = (bits(param) << 16) + remainder.
// Round to nearest, ties away from zero: with ties to even, the even bf16 values would own 65,537
// masters, and 16 bits hold 65,536. A NaN keeps its sign and its upper payload and is made quiet;
// rounded like a number, 0x7fffffff would become -0.

struct Split {
  uint16 param;
  int16 remainder;
};

SHARDADAM_FN Split split_of(float master) {
  uint32 bits = bits_of(master);
  bits = master != master ? (bits | 0x400000u) & 0xffff0000u : bits;
  return {uint16((bits + 0x8000u) >> 16), int16(uint16(bits))};
}

// No master rounds to a zero that it is smaller than: the param was set to zero since the last
// step, by a mask or by hand, and what its old remainder takes from a zero's bits would be a NaN.
SHARDADAM_FN int remainder_of(uint16 param, int remainder) {
  return (param & 0x7fffu) == 0 && remainder < 0 ? 0 : remainder;
}

SHARDADAM_FN float master_of(Split split) {
  return float_of((uint32(split.param) << 16) + uint32(remainder_of(split.param, split.remainder)));
}

}  // namespace shardadam
