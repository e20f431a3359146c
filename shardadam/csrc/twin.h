// What twin.cpp (entry points, dispatch, threads) and adam_cpu.cpp (the loops, compiled once per
// instruction set) share. kernels/cpu.py mirrors Run and the codes below.
#pragma once

#include <cmath>
#include <cstdint>

#include "adam_update.h"
#include "exact_sum.h"
#include "formats.h"

namespace shardadam {

constexpr int kAbiVersion = 3;

// Contiguous elements that share hyperparameters: what of them stays from step to step. Moments are
// float (double with kFloat64).
struct Run {
  void* param;
  void* master;  // int16 remainder, float master, or null
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without AMSGrad
  int64_t numel;
  int32_t param_format;
  int32_t grad_format;
};

using UpdateRange = void (*)(const Run&, const void* grad, const Coefficients&, int64_t begin,
                             int64_t end);
using SumSquares = void (*)(const void* values, int64_t numel, int64_t* words);
// out[begin, end) = the sum of `count` shards in their order, divided by `count`.
using Mean = void (*)(const void* const* shards, int64_t count, void* out, int64_t begin,
                      int64_t end);

// One instruction set's loops.
struct Loops {
  const char* name;
  UpdateRange (*update)(int32_t param_format, int32_t grad_format, int32_t flags);
  SumSquares (*sum_squares)(int32_t grad_format);
  Mean (*mean)(int32_t grad_format);
  void (*split)(const float* master, uint16* param, int16* remainder, int64_t numel);
  void (*join)(const uint16* param, const int16* remainder, float* master, int64_t numel);
};

const Loops& loops_baseline();
const Loops& loops_avx2();
const Loops& loops_avx512();

}  // namespace shardadam
