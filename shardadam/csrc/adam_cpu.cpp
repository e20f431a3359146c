// The CPU twin's loops over adam_update.h, written for the compiler to vectorise. This file is
// compiled once per instruction set (SHARDADAM_ISA); every one gives the same bits, and so do the
// vector body and the scalar tail of a loop, since each operation is correctly rounded.
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

const float* widen(const float* values, int64_t, float*) { return values; }
const double* widen(const double* values, int64_t, double*) { return values; }

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
      halves[2 * i] = uint16(low[i]);
      halves[2 * i + 1] = uint16(high[i] + (low[i] >> 15));
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

// `count` is a constant in full tiles, so that the loops below unroll into each other.
template <class Format, class Grad, bool kAmsgrad, bool kNesterov, bool kL2>
inline __attribute__((always_inline)) void update_tile(const Run& run, const void* all_grads,
                                                       const Coefficients& c, int64_t start,
                                                       int64_t count) {
  using Moment = typename Format::Moment;
  constexpr int64_t kTile = Format::kTile;
  const Format format(run);
  const Grad* grads = static_cast<const Grad*>(all_grads) + start;
  Moment* __restrict exp_avg = static_cast<Moment*>(run.exp_avg) + start;
  Moment* __restrict exp_avg_sq = static_cast<Moment*>(run.exp_avg_sq) + start;
  Moment* __restrict max_exp_avg_sq =
      kAmsgrad ? static_cast<Moment*>(run.max_exp_avg_sq) + start : nullptr;
  format.prefetch(start);
  prefetch<kTile>(grads);
  prefetch<kTile>(exp_avg);
  prefetch<kTile>(exp_avg_sq);

  Moment param_buffer[kTile], grad_buffer[kTile];
  Moment* __restrict param = format.load(start, count, param_buffer);
  const Moment* __restrict grad = widen(grads, count, grad_buffer);
  for (int64_t i = 0; i < count; ++i) {
    Element x{param[i], exp_avg[i], exp_avg_sq[i], kAmsgrad ? max_exp_avg_sq[i] : 0};
    shardadam::update<kAmsgrad, kNesterov, kL2>(x, grad[i], c);
    exp_avg[i] = Moment(x.exp_avg);
    exp_avg_sq[i] = Moment(x.exp_avg_sq);
    if (kAmsgrad) max_exp_avg_sq[i] = Moment(x.max_exp_avg_sq);
    param[i] = Moment(x.param);
  }
  format.store(start, count, param);
}

template <class Format, class Grad, bool kAmsgrad, bool kNesterov, bool kL2>
void update_range(const Run& run, const void* grads, const Coefficients& coefficients,
                  int64_t begin, int64_t end) {
  constexpr int64_t kTile = Format::kTile;
  const Coefficients c = coefficients;
  int64_t start = begin;
  for (; start + kTile <= end; start += kTile)
    update_tile<Format, Grad, kAmsgrad, kNesterov, kL2>(run, grads, c, start, kTile);
  if (start < end)
    update_tile<Format, Grad, kAmsgrad, kNesterov, kL2>(run, grads, c, start, end - start);
}

template <class Format, class Grad>
UpdateRange pick_flags(int32_t flags) {
  switch (flags) {
    case 0: return update_range<Format, Grad, false, false, false>;
    case kFlagAmsgrad: return update_range<Format, Grad, true, false, false>;
    case kFlagNesterov: return update_range<Format, Grad, false, true, false>;
    case kFlagL2: return update_range<Format, Grad, false, false, true>;
    case kFlagL2 | kFlagAmsgrad: return update_range<Format, Grad, true, false, true>;
    case kFlagL2 | kFlagNesterov: return update_range<Format, Grad, false, true, true>;
    default: return nullptr;
  }
}

template <class Format>
UpdateRange pick_grad(int32_t grad_format, int32_t flags) {
  switch (grad_format) {
    case kGradFloat32: return pick_flags<Format, float>(flags);
    case kGradBf16: return pick_flags<Format, Bf16>(flags);
    case kGradFp16: return pick_flags<Format, Fp16>(flags);
    default: return nullptr;
  }
}

UpdateRange pick(int32_t param_format, int32_t grad_format, int32_t flags) {
  switch (param_format) {
    case kFloat32: return pick_grad<Plain<float>>(grad_format, flags);
    case kFloat64:
      return grad_format == kGradFloat64 ? pick_flags<Plain<double>, double>(flags) : nullptr;
    case kBf16Split: return pick_grad<Bf16Split>(grad_format, flags);
    case kBf16Master: return pick_grad<WithMaster<Bf16>>(grad_format, flags);
    case kFp16Master: return pick_grad<WithMaster<Fp16>>(grad_format, flags);
    default: return nullptr;
  }
}

void split(const float* master, uint16* param, int16* remainder, int64_t numel) {
  Run run{};
  run.param = param;
  run.master = remainder;
  constexpr int64_t kTile = Bf16Split::kTile;
  for (int64_t start = 0; start < numel; start += kTile)
    Bf16Split(run).store(start, numel - start < kTile ? numel - start : kTile, master + start);
}

void join(const uint16* param, const int16* remainder, float* master, int64_t numel) {
  Run run{};
  run.param = const_cast<uint16*>(param);
  run.master = const_cast<int16*>(remainder);
  Bf16Split(run).load(0, numel, master);
}

template <class Grad>
void sum_squares(const void* values, int64_t numel, int64_t* words) {
  const Grad* __restrict grad = static_cast<const Grad*>(values);
  for (int64_t start = 0; start < numel; start += kSumBlock) {
    double squares[kSumBlock] = {};
    const int64_t count = numel - start < kSumBlock ? numel - start : kSumBlock;
    for (int64_t i = 0; i < count; ++i) {
      const double value = decode(grad[start + i]);
      squares[i] = value * value;
    }
    for (int64_t half = kSumBlock / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) squares[i] += squares[i + half];
    const Terms terms = terms_of(squares[0]);
    for (int i = 0; i < 3; ++i) words[terms.word + i] += terms.at[i];
  }
}

SumSquares pick_sum(int32_t grad_format) {
  switch (grad_format) {
    case kGradFloat32: return sum_squares<float>;
    case kGradFloat64: return sum_squares<double>;
    case kGradBf16: return sum_squares<Bf16>;
    case kGradFp16: return sum_squares<Fp16>;
    default: return nullptr;
  }
}

// Tile by tile, so that every shard is read from memory once and the sum waits in the cache.
template <class Grad, class Sum>
void mean(const void* const* shards, int64_t ranks, void* all_out, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 512;
  const Sum divisor = Sum(ranks);
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = end - start < kTile ? end - start : kTile;
    Sum* __restrict out = static_cast<Sum*>(all_out) + start;
    Sum sum[kTile];
    const Grad* __restrict first = static_cast<const Grad*>(shards[0]) + start;
    prefetch<kTile>(first);
    for (int64_t i = 0; i < count; ++i) sum[i] = decode(first[i]);
    for (int64_t rank = 1; rank < ranks; ++rank) {
      const Grad* __restrict other = static_cast<const Grad*>(shards[rank]) + start;
      prefetch<kTile>(other);
      for (int64_t i = 0; i < count; ++i) sum[i] = sum[i] + decode(other[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[i] = sum[i] / divisor;
  }
}

Mean pick_mean(int32_t grad_format) {
  switch (grad_format) {
    case kGradFloat32: return mean<float, float>;
    case kGradFloat64: return mean<double, double>;
    case kGradBf16: return mean<Bf16, float>;
    case kGradFp16: return mean<Fp16, float>;
    default: return nullptr;
  }
}

}  // namespace SHARDADAM_ISA

const Loops& CONCAT(loops_, SHARDADAM_ISA)() {
  static const Loops loops{STRING(SHARDADAM_ISA),    SHARDADAM_ISA::pick,  SHARDADAM_ISA::pick_sum,
                           SHARDADAM_ISA::pick_mean, SHARDADAM_ISA::split, SHARDADAM_ISA::join};
  return loops;
}

}  // namespace shardadam
