// The CPU twin's loops over coded_state.h: a block of 128 elements is decoded, updated and coded in
// buffers that stay in the L1 cache. Compiled once per instruction set, as adam_cpu.cpp.
//
// Only the moments' format and the terms of the rule are template arguments of the loops: gradients
// and params are widened to float by functions chosen per run, once per block.
#include <type_traits>

#include "widened_cpu.h"

namespace shardadam {
namespace SHARDADAM_ISA {
namespace {

// No vector of it straddles two cache lines.
template <class T>
struct alignas(64) Lanes {
  T at[kBlock];
  operator T*() { return at; }
  operator const T*() const { return at; }
};
using Floats = Lanes<float>;
using Codes = Lanes<int>;

// What a block is updated with.
struct Block {
  const Run& run;
  const Coefficients& coefficients;
  const Single& single;
  int64_t start;  // its first element in the run
  int64_t count;  // kBlock, or less at the end of the run
  uint64 random;  // the key of its random bits
};

// Fetches the group after this one. Further ahead, as in adam_cpu.cpp, is slower by a tenth: six or
// seven arrays and the buffers share the L1 cache.
inline void prefetch_group(const void* values, int64_t start, int64_t bytes) {
  const char* ahead = static_cast<const char*>(values) + (start + kGroup) * bytes;
  for (int64_t byte = 0; byte < kGroup * bytes; byte += 64) __builtin_prefetch(ahead + byte);
}

// ---- moments ------------------------------------------------------------------------------------
// Each updates `param` and the state of one block. After `count` elements come zeros.

// One block of an array: in place, or at the end of the run a copy filled up with zeros, so that
// every loop below is over a constant number of elements.
template <class T>
class Slice {
 public:
  Slice(void* values, const Block& block)
      : there_(static_cast<T*>(values) + block.start), count_(block.count) {
    if (count_ < kBlock) copy();
  }
  T* values() { return count_ == kBlock ? there_ : copy_; }
  void write_back() {
    if (count_ < kBlock) copy_back();
  }

 private:
  // Out of the way of the loops, which are over whole blocks nearly always.
  __attribute__((noinline, cold)) void copy() {
    for (int64_t i = 0; i < kBlock; ++i) copy_[i] = i < count_ ? there_[i] : T{};
  }
  __attribute__((noinline, cold)) void copy_back() const {
    for (int64_t i = 0; i < count_; ++i) there_[i] = copy_[i];
  }

  T* there_;
  int64_t count_;
  T copy_[kBlock];
};

template <class Code>
inline void widen_codes(const Code* __restrict codes, int* __restrict out) {
  for (int i = 0; i < kBlock; ++i) out[i] = codes[i];
}

template <class Code>
inline void narrow_codes(const int* __restrict values, Slice<Code>&& slice) {
  Code* __restrict codes = slice.values();
  for (int i = 0; i < kBlock; ++i) codes[i] = Code(values[i]);
  slice.write_back();
}

inline float largest_of(const float* values) {
  uint32 largest = 0;  // as bits: a maximum of floats would not be vectorised
  for (int i = 0; i < kBlock; ++i) {
    const uint32 bits = bits_of(size_of(values[i]));
    largest = bits > largest ? bits : largest;
  }
  return float_of(largest);
}

// Whether a block whose squares are now `largest_square` at most needed no check. Any gradient that
// did, and NaN, makes a larger square. (The checks take a fifth of the time: they are left out
// first, and the rare block that needs them is updated again.)
inline bool needed_no_check(float largest_square, const Single& c) {
  return largest_square <= c.forget2 * (kLargestGrad * kLargestGrad * 0.25f);
}

template <bool kAmsgrad, bool kNesterov, bool kL2>
struct Full {
  static constexpr int kAverageBytes = 4, kSquareBytes = 4;
  struct Values {};
  static void store(const Block&, const Values&) {}
  static void update(const Block& block, const float* __restrict param,
                     const float* __restrict grad, float* __restrict updated, Values&) {
    Slice<float> averages(block.run.exp_avg, block), squares(block.run.exp_avg_sq, block);
    Slice<float> maxima(kAmsgrad ? block.run.max_exp_avg_sq : block.run.exp_avg_sq, block);
    float* __restrict exp_avg = averages.values();
    float* __restrict exp_avg_sq = squares.values();
    float* __restrict largest = kAmsgrad ? maxima.values() : nullptr;
    const Coefficients c = block.coefficients;
    for (int i = 0; i < kBlock; ++i) {
      Element x{param[i], exp_avg[i], exp_avg_sq[i], kAmsgrad ? largest[i] : 0};
      shardadam::update<kAmsgrad, kNesterov, kL2>(x, grad[i], c);
      exp_avg[i] = float(x.exp_avg);
      exp_avg_sq[i] = float(x.exp_avg_sq);
      if (kAmsgrad) largest[i] = float(x.max_exp_avg_sq);
      updated[i] = float(x.param);
    }
    averages.write_back();
    squares.write_back();
    if (kAmsgrad) maxima.write_back();
  }
};

template <bool kAmsgrad, bool kNesterov, bool kL2>
struct InBf16 {
  static constexpr int kAverageBytes = 2, kSquareBytes = 2;
  struct Values {};
  static void store(const Block&, const Values&) {}
  static void update(const Block& block, const float* __restrict param,
                     const float* __restrict grad, float* __restrict updated, Values&) {
    Slice<Bf16> averages(block.run.exp_avg, block), squares(block.run.exp_avg_sq, block);
    Slice<Bf16> maxima(kAmsgrad ? block.run.max_exp_avg_sq : block.run.exp_avg_sq, block);
    Floats average, square, largest;
    const auto apply = [&](auto checked) {
      widen(averages.values(), kBlock, average);
      widen(squares.values(), kBlock, square);
      if (kAmsgrad) widen(maxima.values(), kBlock, largest);
      const Single c = block.single;
      for (int i = 0; i < kBlock; ++i) {
        const float g = effective_grad<kL2, checked.value>(grad[i], param[i], c);
        float average_i = average[i], square_i = square[i];
        update_moments<checked.value>(average_i, square_i, g, c);
        if (kAmsgrad) largest[i] = larger(largest[i], square_i);
        const float divisor = sqrtf(kAmsgrad ? largest[i] : square_i);
        updated[i] = updated_param<kNesterov, checked.value>(param[i], grad[i], g, average_i,
                                                             square_i, divisor, c);
        average[i] = average_i;
        square[i] = square_i;
      }
    };
    if (!kL2) apply(std::false_type());
    if (kL2 || !needed_no_check(largest_of(square), block.single)) apply(std::true_type());
    Bf16* __restrict average_out = averages.values();
    Bf16* __restrict square_out = squares.values();
    for (int i = 0; i < kBlock; ++i) average_out[i] = Bf16::of(average[i]);
    for (int i = 0; i < kBlock; ++i) {
      const uint32 bits = random_bits(block.random, uint32(i));
      square_out[i] = {stochastic_bf16(square[i], bits >> 16)};
    }
    averages.write_back();
    squares.write_back();
    if (kAmsgrad) {
      Bf16* __restrict largest_out = maxima.values();
      for (int i = 0; i < kBlock; ++i) largest_out[i] = {bf16_up(largest[i])};
      maxima.write_back();
    }
  }
};

template <class Root, bool kAmsgrad, bool kNesterov, bool kL2>
struct Coded {
  using Storage = typename Root::Storage;
  static constexpr int kAverageBytes = 1, kSquareBytes = sizeof(Storage);

  // Between an update and its codes.
  struct Values {
    Floats ratios, roots, maxima;
    uint16 ratio_scale, root_scale, maxima_scale;
  };

  static void update(const Block& block, const float* __restrict param,
                     const float* __restrict grad, float* __restrict updated, Values& v) {
    float largest_ratio, largest_root;
    if (!kL2) apply<false>(block, param, grad, updated, v, largest_ratio, largest_root);
    if (kL2 || !needed_no_check(largest_root * largest_root, block.single))
      apply<true>(block, param, grad, updated, v, largest_ratio, largest_root);
    v.ratio_scale = Ratio::scale(largest_ratio);
    v.root_scale = Root::scale(largest_root);
    if (kAmsgrad) v.maxima_scale = Root::scale_of_maxima(largest_of(v.maxima));
  }

  template <bool kChecked>
  static inline __attribute__((always_inline)) void apply(
      const Block& block, const float* __restrict param, const float* __restrict grad,
      float* __restrict updated, Values& v, float& largest_ratio, float& largest_root) {
    const Run& run = block.run;
    const Single c = block.single;
    const int64_t index = block.start / kBlock;
    const Ratio ratio_code(run.exp_avg_scale[index]);
    const Root root_code(run.exp_avg_sq_scale[index]);
    const Root maximum_code(kAmsgrad ? run.max_exp_avg_sq_scale[index] : uint16(0));
    Codes ratio_codes, root_codes, maximum_codes;
    widen_codes(Slice<int8>(run.exp_avg, block).values(), ratio_codes);
    widen_codes(Slice<Storage>(run.exp_avg_sq, block).values(), root_codes);
    if (kAmsgrad) widen_codes(Slice<Storage>(run.max_exp_avg_sq, block).values(), maximum_codes);
    float* __restrict ratios = v.ratios;
    float* __restrict roots = v.roots;
    float* __restrict maxima = v.maxima;
    uint32 ratio_bits = 0, root_bits = 0;  // of the largest
    for (int i = 0; i < kBlock; ++i) {
      const float g = effective_grad<kL2, kChecked>(grad[i], param[i], c);
      const float before = root_code.decode(root_codes[i]);
      float average = ratio_code.decode(ratio_codes[i], before), square = before * before;
      update_moments<kChecked>(average, square, g, c);
      const float root = sqrtf(square), ratio = Ratio::of(average, root);
      float divisor = root;
      if (kAmsgrad) maxima[i] = divisor = larger(maximum_code.decode(maximum_codes[i]), root);
      updated[i] =
          updated_param<kNesterov, kChecked>(param[i], grad[i], g, average, square, divisor, c);
      ratios[i] = ratio;
      roots[i] = root;
      const uint32 ratio_size = bits_of(size_of(ratio)), root_size = bits_of(size_of(root));
      ratio_bits = ratio_size > ratio_bits ? ratio_size : ratio_bits;
      root_bits = root_size > root_bits ? root_size : root_bits;
    }
    largest_ratio = float_of(ratio_bits);
    largest_root = float_of(root_bits);
  }

  static void store(const Block& block, const Values& v) {
    const Run& run = block.run;
    const int64_t index = block.start / kBlock;
    run.exp_avg_scale[index] = v.ratio_scale;
    run.exp_avg_sq_scale[index] = v.root_scale;
    const Ratio ratio_code(v.ratio_scale);
    const Root root_code(v.root_scale);
    const float stalls = block.single.stalls;
    Codes ratio_codes, root_codes;
    for (int i = 0; i < kBlock; ++i) {
      const uint32 bits = random_bits(block.random, uint32(i));
      root_codes[i] = root_code.code(v.roots[i], bits >> 16);
      ratio_codes[i] = ratio_code.code(v.ratios[i], bits & 0xffffu, stalls);
    }
    narrow_codes(ratio_codes, Slice<int8>(run.exp_avg, block));
    narrow_codes(root_codes, Slice<Storage>(run.exp_avg_sq, block));
    if (kAmsgrad) {
      run.max_exp_avg_sq_scale[index] = v.maxima_scale;
      const Root maximum_code(v.maxima_scale);
      for (int i = 0; i < kBlock; ++i) root_codes[i] = maximum_code.code_of_maximum(v.maxima[i]);
      narrow_codes(root_codes, Slice<Storage>(run.max_exp_avg_sq, block));
    }
  }
};

template <bool kAmsgrad, bool kNesterov, bool kL2>
using InQ16 = Coded<Root16, kAmsgrad, kNesterov, kL2>;
template <bool kAmsgrad, bool kNesterov, bool kL2>
using InQ8 = Coded<Root8, kAmsgrad, kNesterov, kL2>;

// ---- the loop -----------------------------------------------------------------------------------

// Blocks are updated in groups and coded after, since a block's scales, which its codes wait for,
// are a long chain of operations: beside it, the next block's update goes on.
template <class Moments>
void update_blocks(const Run& run, const void* grads, const Coefficients& coefficients,
                   int64_t begin, int64_t end) {
  const Single single = single_of(coefficients);
  const uint64 state_key = stream_key(run.seed, coefficients.step, kStreamState);
  const uint64 param_key = stream_key(run.seed, coefficients.step, kStreamParam);
  const Params& params = *params_of(run.param_format);
  const Grads& gradients = *grads_of(run.grad_format);
  alignas(64) float param[kGroup], grad[kGroup], updated[kGroup];
  typename Moments::Values values[kGroup / kBlock];
  for (int64_t start = begin; start < end; start += kGroup) {
    const int64_t count = end - start < kGroup ? end - start : kGroup;
    if (count < kGroup)
      for (int64_t i = 0; i < kGroup; ++i) param[i] = grad[i] = 0;
    prefetch_group(grads, start, gradients.bytes);
    prefetch_group(run.param, start, params.bytes);
    prefetch_group(run.master, start, params.master_bytes);
    prefetch_group(run.exp_avg, start, Moments::kAverageBytes);
    prefetch_group(run.exp_avg_sq, start, Moments::kSquareBytes);
    gradients.load(grads, start, count, grad);
    params.load(run, start, count, param);
    const auto block_at = [&](int64_t offset) {
      const uint64 random = block_key(state_key, run.first_block + (start + offset) / kBlock);
      const int64_t left = count - offset;
      return Block{run,   coefficients, single, start + offset, left < kBlock ? left : kBlock,
                   random};
    };
    for (int64_t i = 0; i < count; i += kBlock)
      Moments::update(block_at(i), param + i, grad + i, updated + i, values[i / kBlock]);
    for (int64_t i = 0; i < count; i += kBlock) Moments::store(block_at(i), values[i / kBlock]);
    params.store(run, start, count, updated, param_key);
  }
}

template <template <bool, bool, bool> class Moments>
UpdateRange pick_flags(int32_t flags) {
  switch (flags) {
    case 0: return update_blocks<Moments<false, false, false>>;
    case kFlagAmsgrad: return update_blocks<Moments<true, false, false>>;
    case kFlagNesterov: return update_blocks<Moments<false, true, false>>;
    case kFlagL2: return update_blocks<Moments<false, false, true>>;
    case kFlagL2 | kFlagAmsgrad: return update_blocks<Moments<true, false, true>>;
    case kFlagL2 | kFlagNesterov: return update_blocks<Moments<false, true, true>>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace SHARDADAM_ISA

UpdateRange CONCAT(update_blocks_, SHARDADAM_ISA)(int32_t state_format, int32_t param_format,
                                                  int32_t grad_format, int32_t flags) {
  using namespace SHARDADAM_ISA;
  if (!params_of(param_format) || !grads_of(grad_format)) return nullptr;
  switch (state_format) {
    case kStateFull: return SHARDADAM_ISA::pick_flags<Full>(flags);
    case kStateBf16: return SHARDADAM_ISA::pick_flags<InBf16>(flags);
    case kStateQ16: return SHARDADAM_ISA::pick_flags<InQ16>(flags);
    case kStateQ8: return SHARDADAM_ISA::pick_flags<InQ8>(flags);
    default: return nullptr;
  }
}

}  // namespace shardadam
