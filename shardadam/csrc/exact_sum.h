// An exact sum of non-negative doubles: a fixed-point number of 32-bit limbs, limb k worth
// 2^(32k - 1074), held in 64 bits each so that 2^31 additions can't overflow; the last two words
// count infinities and NaNs. Integers add up to the same total in any order, so a norm can't depend
// on the world size, on threads or on blocks (Kulisch 1971; Neal 2015). kernels/exact_sum.py is the
// same in torch operations.
#pragma once

#include "portable.h"

namespace shardadam {

constexpr int kLimbs = 68;
constexpr int kSumWords = kLimbs + 2;
// Squares are summed in double over each block of 128 elements by halving (64 + 64, 32 + 32, ...,
// the order a warp can keep), and the blocks' sums are added up exactly.
constexpr int kSumBlock = 128;

// What a value adds to three words in a row, the first being `word`.
struct Terms {
  int word;
  int64 at[3];
};

SHARDADAM_FN Terms terms_of(double value) {
  uint64 bits;
  copy_bits(bits, value);
  const int exponent = int(bits >> 52) & 0x7ff;
  uint64 significand = bits & 0xfffffffffffffull;
  if (exponent == 0x7ff) return {kLimbs - 1, {0, significand ? 0 : 1, significand ? 1 : 0}};
  if (exponent) significand |= 1ull << 52;
  const int position = exponent ? exponent - 1 : 0;  // value = significand * 2^(position - 1074)
  const int shift = position % 32;
  const uint64 low = (significand & 0xffffffffu) << shift;
  const uint64 high = (significand >> 32) << shift;
  return {position / 32,
          {int64(low & 0xffffffffu), int64((low >> 32) + (high & 0xffffffffu)), int64(high >> 32)}};
}

// The sum, rounded once to nearest, ties to even.
SHARDADAM_FN double rounded_sum(const int64* words) {
  // The highest digit that is not 0 and the two below it; whether anything lies below those.
  uint64 first = 0, second = 0, third = 0;
  bool below = false;
  int place = 0;
  uint64 carry = 0, previous = 0, before_that = 0;
  bool older = false;
  for (int limb = 0; limb < kLimbs; ++limb) {
    carry += uint64(words[limb]);
    const uint64 digit = carry & 0xffffffffu;
    carry >>= 32;
    if (digit) {
      first = digit;
      second = previous;
      third = before_that;
      below = older;
      place = limb;
    }
    older = older || before_that;
    before_that = previous;
    previous = digit;
  }
  constexpr uint64 kInfinity = 0x7ffull << 52;
  uint64 bits = first << 32 | second;  // a double of a multiple of 2^-1074, if of 53 bits
  if (place == 0) bits = first;
  if (place > 1 || bits >> 53) {
    int zeros = 0;  // above the highest bit of `first`
    while (!(first >> (31 - zeros))) ++zeros;
    const uint64 window = (first << 32 | second) << zeros | (third << zeros) >> 32;
    below = below || ((third << zeros) & 0xffffffffu);
    // Of 64 bits 53 stay; what goes decides on the rounding. The leading one of the significand
    // counts in the exponent, which is therefore one less than it says.
    const uint64 rest = window & 0x7ff;
    const uint64 kept = window >> 11;
    const bool up = rest > 0x400 || (rest == 0x400 && (below || (kept & 1)));
    bits = (uint64(32 * (place - 1) - zeros + 11) << 52) + kept + up;
  }
  if (words[kLimbs] || carry || bits > kInfinity) bits = kInfinity;
  if (words[kLimbs + 1]) bits = kInfinity | 1ull << 51;  // NaN
  double sum;
  copy_bits(sum, bits);
  return sum;
}

}  // namespace shardadam
