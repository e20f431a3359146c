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

// A block's numbers. No vector of it straddles two cache lines.
template <class T>
struct alignas(64) Buffer {
  T at[kBlock];
  operator T*() { return at; }
  operator const T*() const { return at; }
};

// What a block is updated with.
struct Block {
  const Run& run;
  const Coefficients& coefficients;
  const Single& single;
  int64_t start;  // its first element in the run
  int64_t count;  // kBlock, or less at the end of the run
  uint64 random;  // the key of its random bits
};

// Fetches a block of an array that lies 8 blocks ahead, which is measured. Block by block: fetched
// a group at a time, so many lines would be under way that loads wait for a free place.
SHARDADAM_FN void prefetch_block(const void* values, int64_t start, int64_t bytes) {
  const char* ahead = static_cast<const char*>(values) + (start + 8 * kBlock) * bytes;
  for (int64_t byte = 0; byte < kBlock * bytes; byte += 64) __builtin_prefetch(ahead + byte);
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

inline float largest_of(const float* values) {
  uint32 largest = 0;  // as bits: a maximum of floats would not be vectorised
  for (int i = 0; i < kBlock; ++i) {
    const uint32 bits = bits_of(size_of(values[i]));
    largest = bits > largest ? bits : largest;
  }
  return float_of(largest);
}

template <bool kAmsgrad, bool kNesterov, bool kL2>
struct Full {
  static constexpr int kAverageBytes = 4, kSquareBytes = 4;
  struct Values {};
  static void put(const Block&, const Values&) {}
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
  static void put(const Block&, const Values&) {}
  static void update(const Block& block, const float* __restrict param,
                     const float* __restrict grad, float* __restrict updated, Values&) {
    Slice<Bf16> averages(block.run.exp_avg, block), squares(block.run.exp_avg_sq, block);
    Slice<Bf16> maxima(kAmsgrad ? block.run.max_exp_avg_sq : block.run.exp_avg_sq, block);
    Buffer<float> average, square, largest;
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
    Buffer<float> ratios, roots, maxima;
    Buffer<uint32> random;
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

  // In two loops: in one, the operations that wait for a root and then for a division would fill
  // the processor's queues, and none of the next elements' would start.
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
    Slice<int8> ratio_codes(run.exp_avg, block);
    Slice<Storage> root_codes(run.exp_avg_sq, block);
    Slice<Storage> maximum_codes(kAmsgrad ? run.max_exp_avg_sq : run.exp_avg_sq, block);
    const int8* ratio_at = ratio_codes.values();
    const Storage *root_at = root_codes.values(), *maximum_at = maximum_codes.values();
    Buffer<float> averages;
    Uints ratio_bits = 0, root_bits = 0;  // of the largest
    for (int i = 0; i < kBlock; i += kLanes) {
      const Floats g = effective_grad<kL2, kChecked>(load(grad + i), load(param + i), c);
      const Floats before = root_code.decode(load_codes(root_at + i));
      Floats average = ratio_code.decode(load_codes(ratio_at + i), before);
      Floats square = before * before;
      update_moments<kChecked>(average, square, g, c);
      const Floats root = root_of(square);
      store(averages + i, average);
      store(v.roots + i, root);
      root_bits = most(root_bits, bits_of(root));
    }
    for (int i = 0; i < kBlock; i += kLanes) {
      const Floats given = load(grad + i), old = load(param + i);
      const Floats average = load(averages + i), root = load(v.roots + i);
      const Floats g = effective_grad<kL2, kChecked>(given, old, c);
      Floats divisor = root;
      if (kAmsgrad) {
        divisor = larger(maximum_code.decode(load_codes(maximum_at + i)), root);
        store(v.maxima + i, divisor);
      }
      // For the codes: nothing waits for these, and beside divisions there is time for them.
      store(v.random + i, mixed_bits(uint32(block.random), load(kLaneBits.at + i)));
      const Floats ratio = Ratio::of(average, root);
      store(v.ratios + i, ratio);
      ratio_bits = most(ratio_bits, bits_of(size_of(ratio)));
      store(updated + i,
            updated_param<kNesterov, kChecked>(old, given, g, average, root, divisor, c));
    }
    largest_ratio = float_of(largest_of(ratio_bits));
    largest_root = float_of(largest_of(root_bits));
  }

  static void put(const Block& block, const Values& v) {
    const Run& run = block.run;
    const int64_t index = block.start / kBlock;
    run.exp_avg_scale[index] = v.ratio_scale;
    run.exp_avg_sq_scale[index] = v.root_scale;
    const Ratio ratio_code(v.ratio_scale);
    const Root root_code(v.root_scale);
    const float stalls = block.single.stalls;
    Slice<int8> ratio_codes(run.exp_avg, block);
    Slice<Storage> root_codes(run.exp_avg_sq, block);
    int8* ratio_at = ratio_codes.values();
    Storage* root_at = root_codes.values();
    for (int i = 0; i < kBlock; i += kLanes) {
      const Uints bits = load(v.random + i);
      store_codes(root_at + i, root_code.code(load(v.roots + i), bits >> 16));
      store_codes(ratio_at + i, ratio_code.code(load(v.ratios + i), bits & 0xffffu, stalls));
    }
    ratio_codes.write_back();
    root_codes.write_back();
    if (kAmsgrad) {
      run.max_exp_avg_sq_scale[index] = v.maxima_scale;
      const Root maximum_code(v.maxima_scale);
      Slice<Storage> maximum_codes(run.max_exp_avg_sq, block);
      Storage* at = maximum_codes.values();
      for (int i = 0; i < kBlock; i += kLanes)
        store_codes(at + i, maximum_code.code_of_maximum(load(v.maxima + i)));
      maximum_codes.write_back();
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
    gradients.load(grads, start, count, grad);
    params.load(run, start, count, param);
    const auto block_at = [&](int64_t offset) {
      const uint64 random = block_key(state_key, run.first_block + (start + offset) / kBlock);
      const int64_t left = count - offset;
      return Block{run,   coefficients, single, start + offset, left < kBlock ? left : kBlock,
                   random};
    };
    for (int64_t i = 0; i < count; i += kBlock) {
      prefetch_block(grads, start + i, gradients.bytes);
      prefetch_block(run.param, start + i, params.bytes);
      prefetch_block(run.master, start + i, params.master_bytes);
      prefetch_block(run.exp_avg, start + i, Moments::kAverageBytes);
      prefetch_block(run.exp_avg_sq, start + i, Moments::kSquareBytes);
      if (run.max_exp_avg_sq) prefetch_block(run.max_exp_avg_sq, start + i, Moments::kSquareBytes);
      Moments::update(block_at(i), param + i, grad + i, updated + i, values[i / kBlock]);
    }
    for (int64_t i = 0; i < count; i += kBlock) Moments::put(block_at(i), values[i / kBlock]);
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
