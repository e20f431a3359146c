// The CPU twin's loops over adam_update.h, written for the compiler to vectorise. This file is
// compiled once per instruction set (SHARDADAM_ISA); every one gives the same bits, and so do the
// vector body and the scalar tail of a loop, since each operation is correctly rounded.
#include "params_cpu.h"

namespace shardadam {
namespace SHARDADAM_ISA {

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
void mean(const void* const* shards, int64_t ranks, int64_t divide_by, void* all_out, int64_t begin,
          int64_t end) {
  constexpr int64_t kTile = 512;
  const Sum divisor = Sum(divide_by);
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
  static const Loops loops{
      STRING(SHARDADAM_ISA),   SHARDADAM_ISA::pick,      CONCAT(update_blocks_, SHARDADAM_ISA),
      SHARDADAM_ISA::pick_sum, SHARDADAM_ISA::pick_mean, SHARDADAM_ISA::split,
      SHARDADAM_ISA::join};
  return loops;
}

}  // namespace shardadam
