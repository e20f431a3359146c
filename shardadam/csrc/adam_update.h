// The rule: Adam, AdamW, AMSGrad and NAdam for one element, and the number formats.
//
// This text is compiled by the host compiler into the CPU twin, and fit to be compiled by NVRTC
// into a CUDA kernel; kernels/reference.py is the same rule in torch operations. They agree bit for
// bit: every operation here is one correctly rounded IEEE operation (no contraction into fma, no
// fast-math), in an order that is fixed.
//
// Arithmetic is in double, storage is not: a stored fp32 moment or param is rounded once, from a
// value that is exact to about 2^-52. So each step is within half an ulp of the real numbers; in
// float it would be 2 to 6 ulp (docs/numerics.md has the measurement).
#pragma once

#if defined(__CUDACC__)
#define SHARDADAM_FN __device__ __forceinline__
#else
#define SHARDADAM_FN inline __attribute__((always_inline))
#endif

namespace shardadam {

using uint16 = unsigned short;
using int16 = short;
using uint32 = unsigned int;
static_assert(sizeof(uint16) == 2 && sizeof(uint32) == 4, "fixed-width integers");

// What is the same for every element that shares hyperparameters and step t. With
// c1 = 1 - beta1^t and c2 = 1 - beta2^t, Adam's  lr * (m / c1) / (sqrt(v / c2) + eps)  is
//   (exp_avg_to_update * m) / (sqrt(v) + epsilon),
//   exp_avg_to_update = lr * sqrt(c2) / c1,   epsilon = eps * sqrt(c2);
// NAdam adds grad_to_update * g to the numerator (Dozat 2016, in torch.optim.NAdam's form).
//
// The gradient's factor f (loss-scale inverse * clip coefficient, negative to maximize) costs
// nothing per element: it is folded into what the gradient is multiplied by anyway. Only L2 decay,
// which adds to the gradient before, applies it first. The layout is shared with kernels/cpu.py.
struct Coefficients {
  double beta1;
  double beta2;
  double grad_to_exp_avg;     // (1 - beta1) * f
  double grad_to_exp_avg_sq;  // (1 - beta2) * f^2
  double grad_to_update;      // NAdam's term * f
  double exp_avg_to_update;
  double epsilon;
  double keep;         // 1 - lr * weight_decay if decoupled (Loshchilov & Hutter 2019), else 1
  double l2;           // weight_decay if not decoupled
  double grad_factor;  // f with L2 decay, and the three above are without f then
};

struct Element {
  double param;
  double exp_avg;
  double exp_avg_sq;
  double max_exp_avg_sq;
};

// Kingma & Ba 2015, algorithm 1; AMSGrad: Reddi et al. 2018.
template <bool kAmsgrad, bool kNesterov, bool kL2>
SHARDADAM_FN void update(Element& x, double grad, const Coefficients& c) {
  if (kL2) grad = c.grad_factor * grad + c.l2 * x.param;
  x.exp_avg = c.beta1 * x.exp_avg + c.grad_to_exp_avg * grad;
  x.exp_avg_sq = c.beta2 * x.exp_avg_sq + c.grad_to_exp_avg_sq * (grad * grad);
  double square = x.exp_avg_sq;
  if (kAmsgrad) {
    // NaN on either side stays NaN, as in torch.maximum.
    const bool take = x.exp_avg_sq > x.max_exp_avg_sq || x.exp_avg_sq != x.exp_avg_sq;
    x.max_exp_avg_sq = square = take ? x.exp_avg_sq : x.max_exp_avg_sq;
  }
  double numerator = c.exp_avg_to_update * x.exp_avg;
  if (kNesterov) numerator = numerator + c.grad_to_update * grad;
  x.param = c.keep * x.param - numerator / (sqrt(square) + c.epsilon);
}

// ---- number formats: bit conversions, the same everywhere -------------------------------------

SHARDADAM_FN uint32 bits_of(float value) {
  uint32 bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

SHARDADAM_FN float float_of(uint32 bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
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

SHARDADAM_FN float master_of(Split split) {
  return float_of((uint32(split.param) << 16) + uint32(int(split.remainder)));
}

}  // namespace shardadam
