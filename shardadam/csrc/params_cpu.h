// What the CPU twin's loops read and write beside the moments: gradients, and params in every
// format. Included by the files that are compiled once per instruction set.
#pragma once

#include "twin.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace shardadam {
// A namespace per instruction set: the linker must not merge one's templates with another's.
namespace SHARDADAM_ISA {

constexpr int64_t kPrefetchBytes = 3072;

// Work goes tile by tile: a 16-bit operand is widened into a small buffer first, in a loop of its
// own, because a loop that mixes 16- and 64-bit lanes spends its time on shuffles. Tiles (kTile
// elements, measured per format) are small enough that one's conversions overlap with its
// neighbour's divisions.

// Fetches the tile that lies kPrefetchBytes ahead: the divider leaves the processor too little
// look-ahead to do so by itself (worth 15 % at one thread).
template <int64_t kTile, class T>
void prefetch(const T* values) {
  const char* ahead = reinterpret_cast<const char*>(values) + kPrefetchBytes;
  for (int64_t byte = 0; byte < kTile * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(ahead + byte);
}

inline const float* widen(const float* values, int64_t, float*) { return values; }
inline const double* widen(const double* values, int64_t, double*) { return values; }

template <class T>
const float* widen(const T* values, int64_t count, float* __restrict buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = decode(values[i]);
  return buffer;
}

// Param formats: `load` gives a block of master weights to be updated in place, `store` puts it
// back.

template <class T>
struct Plain {
  using Moment = T;
  static constexpr int64_t kTile = 64;
  T* param;
  explicit Plain(const Run& run) : param(static_cast<T*>(run.param)) {}
  T* load(int64_t start, int64_t, T*) const { return param + start; }
  void store(int64_t, int64_t, const T*) const {}
  void prefetch(int64_t start) const { SHARDADAM_ISA::prefetch<kTile>(param + start); }
};

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a float's lower half comes first");
using HalfOfFloat = uint16 __attribute__((may_alias));

struct Bf16Split {
  using Moment = float;
  static constexpr int64_t kTile = 128;
  uint16* param;
  int16* remainder;
  explicit Bf16Split(const Run& run)
      : param(static_cast<uint16*>(run.param)), remainder(static_cast<int16*>(run.master)) {}
  // adam_update.h's master_of() and split_of() on 16-bit halves, which takes half the instructions:
  // to round is to carry the remainder's top bit into the upper half.
  float* load(int64_t start, int64_t count, float* buffer) const {
    const uint16* __restrict high = param + start;
    const int16* __restrict low = remainder + start;
    HalfOfFloat* __restrict halves = reinterpret_cast<HalfOfFloat*>(buffer);
    for (int64_t i = 0; i < count; ++i) {
      const int16 above = low[i] > 0 ? low[i] : int16(0);
      const int16 rest = high[i] & 0x7fff ? low[i] : above;  // remainder_of()
      halves[2 * i] = uint16(rest);
      halves[2 * i + 1] = uint16(high[i] + (rest >> 15));
    }
    return buffer;
  }
  void store(int64_t start, int64_t count, const float* buffer) const {
    uint16* __restrict high = param + start;
    int16* __restrict low = remainder + start;
    uint32 largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32 magnitude = bits_of(buffer[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (is_nan_bits(largest)) return store_with_nan(start, count, buffer);
    const HalfOfFloat* __restrict halves = reinterpret_cast<const HalfOfFloat*>(buffer);
    for (int64_t i = 0; i < count; ++i) {
      const int16 rest = int16(halves[2 * i]);
      high[i] = uint16(halves[2 * i + 1] - (rest >> 15));
      low[i] = rest;
    }
  }
  // Out of the way of the loops above (inlined, it costs 6 % of the update).
  __attribute__((noinline, cold)) void store_with_nan(int64_t start, int64_t count,
                                                      const float* buffer) const {
    for (int64_t i = 0; i < count; ++i) {
      const Split split = split_of(buffer[i]);
      param[start + i] = split.param;
      remainder[start + i] = split.remainder;
    }
  }
  void prefetch(int64_t start) const {
    SHARDADAM_ISA::prefetch<kTile>(param + start);
    SHARDADAM_ISA::prefetch<kTile>(remainder + start);
  }
};

template <class Half>
struct WithMaster {
  using Moment = float;
  static constexpr int64_t kTile = 128;
  Half* param;
  float* master;
  explicit WithMaster(const Run& run)
      : param(static_cast<Half*>(run.param)), master(static_cast<float*>(run.master)) {}
  float* load(int64_t start, int64_t count, float* buffer) const {
    const Half* __restrict rounded = param + start;
    const float* __restrict exact = master + start;
    for (int64_t i = 0; i < count; ++i) buffer[i] = current_master(exact[i], rounded[i]);
    return buffer;
  }
  void store(int64_t start, int64_t count, const float* buffer) const {
    Half* __restrict rounded = param + start;
    float* __restrict exact = master + start;
    for (int64_t i = 0; i < count; ++i) {
      exact[i] = buffer[i];
      rounded[i] = Half::of(buffer[i]);
    }
  }
  void prefetch(int64_t start) const {
    SHARDADAM_ISA::prefetch<kTile>(param + start);
    SHARDADAM_ISA::prefetch<kTile>(master + start);
  }
};

}  // namespace SHARDADAM_ISA
}  // namespace shardadam
