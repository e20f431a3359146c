// Params and gradients of any format as floats, by functions that are chosen at run time: a call
// per group of blocks costs nothing, and a format more is no loop of coded_cpu.cpp more.
#pragma once

#include "vectors_cpu.h"

namespace shardadam {
namespace SHARDADAM_ISA {
namespace {

// Elements that are widened at a time, which together stay in the L1 cache.
constexpr int64_t kGroup = 2 * kBlock;

// Rounds a group's masters stochastically by kBits and gives them to `put(place, bits)`, vector by
// vector, with whatever is in the last kBits. False, and nothing done, where one is so large that
// it might become infinite, or NaN. `random`: the key of the stream.
template <int kBits, class Put>
SHARDADAM_FN bool round_group(const Run& run, int64_t start, const float* masters, uint64 random,
                              Put put) {
  Uints largest = 0;
  for (int64_t i = 0; i < kGroup; i += kLanes)
    largest = most(largest, bits_of(size_of(load(masters + i))));
  if (largest_of(largest) >= 0x7f7f0000u) return false;
  for (int64_t block = 0; block < kGroup; block += kBlock) {
    const uint32 key = uint32(block_key(random, run.first_block + (start + block) / kBlock));
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Uints bits = mixed_bits(key, load(kLaneBits.at + i)) >> (32 - kBits);
      put(block + i, bits_of(load(masters + block + i)) + bits);
    }
  }
  return true;
}

// The same for any masters, one by one.
template <int kBits, class Put>
SHARDADAM_FN void round_each(const Run& run, int64_t start, int64_t count, const float* masters,
                             uint64 random, Put put) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64 key = block_key(random, run.first_block + (start + i) / kBlock);
    put(i, stochastic_bits<kBits>(masters[i], random_bits(key, uint32(i % kBlock))));
  }
}

struct Bf16Split8 {
  static SHARDADAM_FN void load(const Run& run, int64_t start, int64_t count,
                                float* __restrict out) {
    const uint16* param = static_cast<const uint16*>(run.param) + start;
    const int8* remainder = static_cast<const int8*>(run.master) + start;
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Ints high = load_codes(param + i), low = load_codes(remainder + i);
      const Ints rest = select((high & 0x7fff) == Ints(0), most(low, Ints(0)), low);
      SHARDADAM_ISA::store(out + i, float_of((to_uint(high) << 16) + (to_uint(rest) << 8)));
    }
    for (int64_t i = whole; i < count; ++i) out[i] = master_of(Split8{param[i], remainder[i]});
  }
  static SHARDADAM_FN void store(const Run& run, int64_t start, int64_t count, const float* masters,
                                 uint64 random) {
    uint16* param = static_cast<uint16*>(run.param) + start;
    int8* remainder = static_cast<int8*>(run.master) + start;
    const auto put = [&](int64_t i, Uints bits) {
      store_codes(param + i, to_int((bits + 0x8000u) >> 16));
      store_codes(remainder + i, to_int(bits >> 8));
    };
    if (count == kGroup && round_group<8>(run, start, masters, random, put)) return;
    round_each<8>(run, start, count, masters, random, [&](int64_t i, uint32 bits) {
      param[i] = uint16((bits + 0x8000u) >> 16);
      remainder[i] = int8(uint8(bits >> 8));
    });
  }
};

struct Bf16Only {
  static SHARDADAM_FN void load(const Run& run, int64_t start, int64_t count,
                                float* __restrict out) {
    const uint16* __restrict param = static_cast<const uint16*>(run.param) + start;
    for (int64_t i = 0; i < count; ++i) out[i] = float_of_bf16(param[i]);
  }
  static SHARDADAM_FN void store(const Run& run, int64_t start, int64_t count, const float* masters,
                                 uint64 random) {
    uint16* param = static_cast<uint16*>(run.param) + start;
    const auto put = [&](int64_t i, Uints bits) { store_codes(param + i, to_int(bits >> 16)); };
    if (count == kGroup && round_group<16>(run, start, masters, random, put)) return;
    round_each<16>(run, start, count, masters, random,
                   [&](int64_t i, uint32 bits) { param[i] = uint16(bits >> 16); });
  }
};

// A format of adam_cpu.cpp's loops.
template <class Format>
struct Shared {
  static SHARDADAM_FN void load(const Run& run, int64_t start, int64_t count,
                                float* __restrict out) {
    const float* masters = Format(run).load(start, count, out);
    if (masters != out)
      for (int64_t i = 0; i < count; ++i) out[i] = masters[i];
  }
  static SHARDADAM_FN void store(const Run& run, int64_t start, int64_t count, const float* masters,
                                 uint64) {
    Format(run).store(start, count, masters);
  }
};

struct InPlace : Shared<Plain<float>> {
  static SHARDADAM_FN void store(const Run& run, int64_t start, int64_t count, const float* masters,
                                 uint64) {
    float* __restrict param = static_cast<float*>(run.param) + start;
    for (int64_t i = 0; i < count; ++i) param[i] = masters[i];
  }
};

// The loops of a format, with a constant number of elements where a group is whole.
template <class Format>
void load_params(const Run& run, int64_t start, int64_t count, float* out) {
  if (count == kGroup) return Format::load(run, start, kGroup, out);
  Format::load(run, start, count, out);
}
template <class Format>
void store_params(const Run& run, int64_t start, int64_t count, const float* masters,
                  uint64 random) {
  if (count == kGroup) return Format::store(run, start, kGroup, masters, random);
  Format::store(run, start, count, masters, random);
}

struct Params {
  void (*load)(const Run&, int64_t start, int64_t count, float* out);
  void (*store)(const Run&, int64_t start, int64_t count, const float* masters, uint64 random);
  int bytes;
  int master_bytes;
};
template <class Format>
constexpr Params loops_of(int bytes, int master_bytes) {
  return {load_params<Format>, store_params<Format>, bytes, master_bytes};
}

inline const Params* params_of(int32_t param_format) {
  static const Params in_place = loops_of<InPlace>(4, 0);
  static const Params split = loops_of<Shared<Bf16Split>>(2, 2);
  static const Params bf16_master = loops_of<Shared<WithMaster<Bf16>>>(2, 4);
  static const Params fp16_master = loops_of<Shared<WithMaster<Fp16>>>(2, 4);
  static const Params split8 = loops_of<Bf16Split8>(2, 1);
  static const Params bf16_only = loops_of<Bf16Only>(2, 0);
  switch (param_format) {
    case kFloat32: return &in_place;
    case kBf16Split: return &split;
    case kBf16Master: return &bf16_master;
    case kFp16Master: return &fp16_master;
    case kBf16Split8: return &split8;
    case kBf16Only: return &bf16_only;
    default: return nullptr;
  }
}

template <class Grad>
void load_grad(const void* grads, int64_t start, int64_t count, float* __restrict out) {
  const Grad* __restrict grad = static_cast<const Grad*>(grads) + start;
  if (count == kGroup)
    for (int64_t i = 0; i < kGroup; ++i) out[i] = decode(grad[i]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = decode(grad[i]);
}

struct Grads {
  void (*load)(const void* grads, int64_t start, int64_t count, float* out);
  int bytes;
};

inline const Grads* grads_of(int32_t grad_format) {
  static const Grads fp32{load_grad<float>, 4}, bf16{load_grad<Bf16>, 2}, fp16{load_grad<Fp16>, 2};
  switch (grad_format) {
    case kGradFloat32: return &fp32;
    case kGradBf16: return &bf16;
    case kGradFp16: return &fp16;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace SHARDADAM_ISA
}  // namespace shardadam
