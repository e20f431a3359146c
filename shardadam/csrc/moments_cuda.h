// Moments in every format that goes by blocks, as a lane of a CUDA warp reads, updates, codes and
// writes its part of a block. No arithmetic of the rule: that is called, in the order of
// coded_cpu.cpp.
#pragma once

#include "batch_cuda.h"
#include "coded_state.h"
#include "memory_cuda.h"

namespace shardadam {

constexpr int kLanes = 32;
// 16 bytes of 16-bit operands, so that half a warp has a block: two blocks are under way at once,
// and their maxima take four shuffles instead of five.
constexpr int kOwn = 8;
constexpr int kLanesOfBlock = kBlock / kOwn;
constexpr int kBlocksOfWarp = kLanes / kLanesOfBlock;

// A lane's elements: kOwn of them, `count` of which exist.
struct Place {
  int64 block;  // of the bucket's shard
  int64 index;  // of the first, in the bucket's shard
  uint32 lane;  // of the first, in the block
  int count;
};

// What the elements of a run have in common.
struct Terms {
  Coefficients coefficients;
  Single single;
};

// The largest size of a block's numbers, for each of its lanes.
SHARDADAM_FN float largest_of_block(const float (&values)[kOwn]) {
  float largest = size_of(values[0]);
#pragma unroll
  for (int i = 1; i < kOwn; ++i) largest = larger(largest, size_of(values[i]));
#pragma unroll
  for (int distance = kLanesOfBlock / 2; distance > 0; distance /= 2)
    largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
}

template <int kFlags>
struct Rule {
  static constexpr bool kAmsgrad = kFlags & kFlagAmsgrad;
  static constexpr bool kNesterov = kFlags & kFlagNesterov;
  static constexpr bool kL2 = kFlags & kFlagL2;
};

// Moments of type T, as adam_cuda.cu's; for params that are rounded stochastically.
template <class T, int kFlags>
struct Uncoded : Rule<kFlags> {
  using Rule<kFlags>::kAmsgrad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;

  struct Values {
    T averages[kOwn], squares[kOwn], largest[kOwn];
  };
  struct Updated {};

  explicit SHARDADAM_FN Uncoded(const Batch& batch)
      : exp_avg(static_cast<T*>(batch.exp_avg)),
        exp_avg_sq(static_cast<T*>(batch.exp_avg_sq)),
        max_exp_avg_sq(static_cast<T*>(batch.max_exp_avg_sq)) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(exp_avg + index) && aligned(exp_avg_sq + index) &&
           (!kAmsgrad || aligned(max_exp_avg_sq + index));
  }
  template <class Access>
  SHARDADAM_FN void load(Access access, const Place& at, Values& values) const {
    access.load(values.averages, exp_avg + at.index);
    access.load(values.squares, exp_avg_sq + at.index);
    if constexpr (kAmsgrad) access.load(values.largest, max_exp_avg_sq + at.index);
  }
  template <class Access>
  SHARDADAM_FN void store(Access access, const Place& at, const Values& values) const {
    access.store(exp_avg + at.index, values.averages);
    access.store(exp_avg_sq + at.index, values.squares);
    if constexpr (kAmsgrad) access.store(max_exp_avg_sq + at.index, values.largest);
  }
  SHARDADAM_FN void load_scales(const Place&, Values&) const {}
  SHARDADAM_FN void store_scales(const Place&, const Values&) const {}
  static SHARDADAM_FN void code(Values&, const Updated&, const Place&, const Terms&, uint64) {}
};

template <int kFlags>
struct Full : Uncoded<float, kFlags> {
  using Uncoded<float, kFlags>::Uncoded;
  using R = Rule<kFlags>;
  using typename Uncoded<float, kFlags>::Values;
  using typename Uncoded<float, kFlags>::Updated;

  static SHARDADAM_FN void update(Values& values, float (&params)[kOwn], const float (&grads)[kOwn],
                                  const Place&, const Terms& terms, uint64, Updated&) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      Element x{params[i], values.averages[i], values.squares[i], 0};
      if constexpr (R::kAmsgrad) x.max_exp_avg_sq = values.largest[i];
      shardadam::update<R::kAmsgrad, R::kNesterov, R::kL2>(x, grads[i], terms.coefficients);
      params[i] = float(x.param);
      values.averages[i] = float(x.exp_avg);
      values.squares[i] = float(x.exp_avg_sq);
      if constexpr (R::kAmsgrad) values.largest[i] = float(x.max_exp_avg_sq);
    }
  }
};

template <int kFlags>
struct InBf16 : Uncoded<Bf16, kFlags> {
  using Uncoded<Bf16, kFlags>::Uncoded;
  using R = Rule<kFlags>;
  using typename Uncoded<Bf16, kFlags>::Values;
  using typename Uncoded<Bf16, kFlags>::Updated;

  static SHARDADAM_FN void update(Values& values, float (&params)[kOwn], const float (&grads)[kOwn],
                                  const Place& at, const Terms& terms, uint64 random, Updated&) {
    const Single& c = terms.single;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float grad = effective_grad<R::kL2, true>(grads[i], params[i], c);
      float average = decode(values.averages[i]), square = decode(values.squares[i]);
      update_moments<true>(average, square, grad, c);
      float largest = square;
      if constexpr (R::kAmsgrad) largest = larger(decode(values.largest[i]), square);
      params[i] = updated_param<R::kNesterov, true>(params[i], grads[i], grad, average, square,
                                                    sqrtf(largest), c);
      const uint32 bits = random_bits(random, at.lane + i);
      values.averages[i] = Bf16::of(average);
      values.squares[i] = {stochastic_bf16(square, bits >> 16)};
      if constexpr (R::kAmsgrad) values.largest[i] = {bf16_up(largest)};
    }
  }
};

template <class Root, int kFlags>
struct Coded {
  using R = Rule<kFlags>;
  using Code = typename Root::Storage;
  int8* exp_avg;
  Code* exp_avg_sq;
  Code* max_exp_avg_sq;
  uint16* exp_avg_scale;
  uint16* exp_avg_sq_scale;
  uint16* max_exp_avg_sq_scale;

  struct Values {
    int8 ratios[kOwn];
    Code roots[kOwn], maxima[kOwn];
    uint16 ratio_scale, root_scale, maximum_scale;
  };
  // Between the update and its codes.
  struct Updated {
    float ratios[kOwn], roots[kOwn], maxima[kOwn];
  };

  explicit SHARDADAM_FN Coded(const Batch& batch)
      : exp_avg(static_cast<int8*>(batch.exp_avg)),
        exp_avg_sq(static_cast<Code*>(batch.exp_avg_sq)),
        max_exp_avg_sq(static_cast<Code*>(batch.max_exp_avg_sq)),
        exp_avg_scale(batch.exp_avg_scale),
        exp_avg_sq_scale(batch.exp_avg_sq_scale),
        max_exp_avg_sq_scale(batch.max_exp_avg_sq_scale) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(exp_avg + index) && aligned(exp_avg_sq + index) &&
           (!R::kAmsgrad || aligned(max_exp_avg_sq + index));
  }
  template <class Access>
  SHARDADAM_FN void load(Access access, const Place& at, Values& values) const {
    access.load(values.ratios, exp_avg + at.index);
    access.load(values.roots, exp_avg_sq + at.index);
    if constexpr (R::kAmsgrad) access.load(values.maxima, max_exp_avg_sq + at.index);
  }
  // A block beyond the end of the run has no scales.
  SHARDADAM_FN void load_scales(const Place& at, Values& values) const {
    values.ratio_scale = at.count ? exp_avg_scale[at.block] : uint16(0);
    values.root_scale = at.count ? exp_avg_sq_scale[at.block] : uint16(0);
    if constexpr (R::kAmsgrad)
      values.maximum_scale = at.count ? max_exp_avg_sq_scale[at.block] : uint16(0);
  }

  template <class Access>
  SHARDADAM_FN void store(Access access, const Place& at, const Values& values) const {
    access.store(exp_avg + at.index, values.ratios);
    access.store(exp_avg_sq + at.index, values.roots);
    if constexpr (R::kAmsgrad) access.store(max_exp_avg_sq + at.index, values.maxima);
  }
  SHARDADAM_FN void store_scales(const Place& at, const Values& values) const {
    if (at.lane != 0 || !at.count) return;
    exp_avg_scale[at.block] = values.ratio_scale;
    exp_avg_sq_scale[at.block] = values.root_scale;
    if constexpr (R::kAmsgrad) max_exp_avg_sq_scale[at.block] = values.maximum_scale;
  }

  static SHARDADAM_FN void update(const Values& values, float (&params)[kOwn],
                                  const float (&grads)[kOwn], const Place&, const Terms& terms,
                                  uint64, Updated& now) {
    const Single& c = terms.single;
    const Ratio ratio_code(values.ratio_scale);
    const Root root_code(values.root_scale);
    const Root maximum_code(R::kAmsgrad ? values.maximum_scale : uint16(0));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float grad = effective_grad<R::kL2, true>(grads[i], params[i], c);
      const float before = root_code.decode(values.roots[i]);
      float average = ratio_code.decode(values.ratios[i], before), square = before * before;
      update_moments<true>(average, square, grad, c);
      float divisor = now.roots[i] = sqrtf(square);
      now.ratios[i] = Ratio::of(average, divisor);
      if constexpr (R::kAmsgrad)
        now.maxima[i] = divisor = larger(maximum_code.decode(values.maxima[i]), divisor);
      params[i] =
          updated_param<R::kNesterov, true>(params[i], grads[i], grad, average, square, divisor, c);
    }
  }

  // All lanes of a warp together.
  static SHARDADAM_FN void code(Values& values, const Updated& now, const Place& at,
                                const Terms& terms, uint64 random) {
    values.ratio_scale = Ratio::scale(largest_of_block(now.ratios));
    values.root_scale = Root::scale(largest_of_block(now.roots));
    const Ratio ratio_code(values.ratio_scale);
    const Root root_code(values.root_scale);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32 bits = random_bits(random, at.lane + i);
      values.roots[i] = Code(root_code.code(now.roots[i], bits >> 16));
      values.ratios[i] = int8(ratio_code.code(now.ratios[i], bits & 0xffffu, terms.single.stalls));
    }
    if constexpr (R::kAmsgrad) {
      values.maximum_scale = Root::scale_of_maxima(largest_of_block(now.maxima));
      const Root maximum_code(values.maximum_scale);
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        values.maxima[i] = Code(maximum_code.code_of_maximum(now.maxima[i]));
    }
  }
};

template <int kFormat, int kFlags>
struct MomentsType;
template <int kFlags>
struct MomentsType<kStateFull, kFlags> {
  using Type = Full<kFlags>;
};
template <int kFlags>
struct MomentsType<kStateBf16, kFlags> {
  using Type = InBf16<kFlags>;
};
template <int kFlags>
struct MomentsType<kStateQ16, kFlags> {
  using Type = Coded<Root16, kFlags>;
};
template <int kFlags>
struct MomentsType<kStateQ8, kFlags> {
  using Type = Coded<Root8, kFlags>;
};

}  // namespace shardadam
