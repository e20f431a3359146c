// What twin.cpp (entry points, dispatch, threads) and adam_cpu.cpp (the loops, compiled once per
// instruction set) share. kernels/cpu.py mirrors Run and the codes below.
#pragma once

#include <cmath>
#include <cstdint>

#include "adam_update.h"
#include "coded_state.h"
#include "exact_sum.h"
#include "formats.h"

namespace shardadam {

constexpr int kAbiVersion = 5;

// Contiguous elements that share hyperparameters: what of them stays from step to step.
struct Run {
  void* param;
  void* master;  // int16 or int8 remainder, float master, or null
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;   // null without AMSGrad
  uint16* exp_avg_scale;  // bf16, one per block; null where the state has none
  uint16* exp_avg_sq_scale;
  uint16* max_exp_avg_sq_scale;
  int64_t numel;
  int64_t first_block;  // the number of the block that the run starts with
  int64_t seed;
  int32_t param_format;
  int32_t state_format;
  int32_t grad_format;
};

// State is coded, or a param is rounded stochastically: whole blocks are updated, by loops of their
// own.
inline bool by_blocks(const Run& run) {
  return run.state_format != kStateFull || run.param_format == kBf16Split8 ||
         run.param_format == kBf16Only;
}

using UpdateRange = void (*)(const Run&, const void* grad, const Coefficients&, int64_t begin,
                             int64_t end);
using SumSquares = void (*)(const void* values, int64_t numel, int64_t* words);
// out[begin, end) = the sum of `count` shards in their order, divided by `divisor`.
using Mean = void (*)(const void* const* shards, int64_t count, int64_t divisor, void* out,
                      int64_t begin, int64_t end);

// One instruction set's loops.
struct Loops {
  const char* name;
  UpdateRange (*update)(int32_t param_format, int32_t grad_format, int32_t flags);
  // For runs that go by blocks; its ranges start with a block and end with one or with the run.
  UpdateRange (*update_blocks)(int32_t state_format, int32_t param_format, int32_t grad_format,
                               int32_t flags);
  SumSquares (*sum_squares)(int32_t grad_format);
  Mean (*mean)(int32_t grad_format);
  void (*split)(const float* master, uint16* param, int16* remainder, int64_t numel);
  void (*join)(const uint16* param, const int16* remainder, float* master, int64_t numel);
};

// coded_cpu.cpp's part of the loops.
UpdateRange update_blocks_baseline(int32_t, int32_t, int32_t, int32_t);
UpdateRange update_blocks_avx2(int32_t, int32_t, int32_t, int32_t);
UpdateRange update_blocks_avx512(int32_t, int32_t, int32_t, int32_t);

const Loops& loops_baseline();
const Loops& loops_avx2();
const Loops& loops_avx512();

}  // namespace shardadam

// The entry points, which twin.cpp describes.
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t shardadam_abi_version();
EXPORT const char* shardadam_isa();
EXPORT int32_t shardadam_use_isa(const char* name);
EXPORT void shardadam_use_openmp(void* parallel, void* thread_num, void* num_threads);
EXPORT int64_t shardadam_update(const shardadam::Run* const* runs, const void* const* grads,
                                const shardadam::Coefficients* const* coefficients, int64_t count,
                                int32_t threads);
EXPORT int64_t shardadam_sum_squares(const void* values, int64_t numel, int32_t grad_format,
                                     int64_t* words, int32_t threads);
EXPORT int64_t shardadam_mean(const void* const* shards, int64_t count, int64_t divisor, void* out,
                              int64_t numel, int32_t grad_format, int32_t threads);
EXPORT void shardadam_split(const float* master, uint16_t* param, int16_t* remainder, int64_t numel,
                            int32_t threads);
EXPORT void shardadam_join(const uint16_t* param, const int16_t* remainder, float* master,
                           int64_t numel, int32_t threads);
