// The update of runs on a GPU whose state is coded or whose params are rounded stochastically: a
// block of 128 elements is decoded, updated and coded in the registers of half a warp.
//
// NVRTC compiles this text for each (architecture, SHARDADAM_PARAM, SHARDADAM_STATE,
// SHARDADAM_GRAD, SHARDADAM_FLAGS) in use: numbers of the enums in formats.h. Tests compile it with
// the host compiler too.
#include "batch_cuda.h"
#include "moments_cuda.h"
#include "params_cuda.h"

namespace shardadam {

constexpr int64 kBlocksOfPart = kElementsOfPart / kBlock;
static_assert(kBlocksOfPart % kBlocksOfWarp == 0, "no warp's blocks lie in two parts");

template <class Format, class Moments, class Grad>
struct BlockRun {
  // Addresses are the bucket's, which need no registers: they stay among the kernel's arguments.
  Format format;
  Moments moments;
  const Grad* grad;
  int64 start;
  int64 numel;
  int64 first_block;
  Terms terms;
  uint64 state_key, param_key;
  bool whole, grad_is_whole;  // can be loaded 16 bytes at a time

  SHARDADAM_FN BlockRun(const Batch& batch, int piece)
      : format(batch.param, batch.master, 0),
        moments(batch),
        grad(static_cast<const Grad*>(batch.grads.values[piece])),
        start(batch.start[piece]),
        numel(batch.grads.numel[piece]),
        first_block(batch.first_block[piece]) {
    Coefficients c = batch.coefficients[batch.coefficient[piece]];
    // What these terms are without, the compiler is to know.
    if (!Moments::R::kNesterov) c.grad_to_update = 0;
    if (!Moments::R::kL2) c.l2 = 0;
    terms = {c, single_of(c)};
    state_key = stream_key(batch.seed, c.step, kStreamState);
    param_key = stream_key(batch.seed, c.step, kStreamParam);
    whole = format.is_aligned(start) && moments.is_aligned(start);
    grad_is_whole = whole && aligned(grad);
  }

  SHARDADAM_FN void update_block(int64 block) const {
    const uint32 lane = threadIdx.x % kLanesOfBlock * kOwn;
    const int64 index = block * kBlock + lane, left = numel - index;
    const int count = left < 0 ? 0 : left < kOwn ? int(left) : kOwn;
    const Place at{start / kBlock + block, start + index, lane, count};
    const int64 number = first_block + block;
    const uint64 random = block_key(state_key, number);
    const bool all = whole && count == kOwn;
    Grad given[kOwn];
    float params[kOwn], grads[kOwn];
    typename Moments::Values values;
    typename Moments::Updated now;
    moments.load_scales(at, values);
    if (grad_is_whole && all)
      Whole{}.load(given, grad + index);
    else
      OneByOne{count}.load(given, grad + index);
    if (all) {
      format.load(Whole{}, at.index, params);
      moments.load(Whole{}, at, values);
    } else {
      format.load(OneByOne{count}, at.index, params);
      moments.load(OneByOne{count}, at, values);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) grads[i] = decode(given[i]);
    moments.update(values, params, grads, at, terms, random, now);
    // Before the codes, which wait for the whole block: it frees registers.
    if (all)
      store_params(Whole{}, at, number, params);
    else
      store_params(OneByOne{count}, at, number, params);
    moments.code(values, now, at, terms, random);
    if (all)
      moments.store(Whole{}, at, values);
    else
      moments.store(OneByOne{count}, at, values);
    moments.store_scales(at, values);
  }

  template <class Access>
  SHARDADAM_FN void store_params(Access access, const Place& at, int64 number,
                                 const float (&params)[kOwn]) const {
    if constexpr (Format::kStochastic) {
      const uint64 key = block_key(param_key, number);
      uint32 random[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) random[i] = random_bits(key, at.lane + i);
      format.store(access, at.index, params, random);
    } else {
      format.store(access, at.index, params);
    }
  }

  // This warp's share of a part. All lanes of a warp go through the loop together, as its shuffles
  // want it.
  SHARDADAM_FN void update_part(int64 part) const {
    const int64 blocks = (numel + kBlock - 1) / kBlock;
    const int64 end = (part + 1) * kBlocksOfPart < blocks ? (part + 1) * kBlocksOfPart : blocks;
    const int64 warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const int64 own = threadIdx.x % kLanes / kLanesOfBlock;
    for (int64 first = part * kBlocksOfPart + warp * kBlocksOfWarp; first < end;
         first += warps * kBlocksOfWarp)
      update_block(first + own);
  }
};

template <int kParam, int kState, int kGrad, int kFlags>
SHARDADAM_FN void update_batch_by_blocks(const Batch& batch) {
  using Format = typename ParamType<kParam>::Type;
  using Moments = typename MomentsType<kState, kFlags>::Type;
  using Grad = typename GradType<kGrad>::Type;
  if (batch.skip && *batch.skip != 0) return;
  const uint32* first_part = batch.grads.first_part;
  for (uint32 part = blockIdx.x; part < first_part[batch.grads.count]; part += gridDim.x) {
    const int piece = piece_of(batch.grads, part);
    const BlockRun<Format, Moments, Grad> run(batch, piece);
    run.update_part(part - first_part[piece]);
  }
}

}  // namespace shardadam

#if defined(SHARDADAM_PARAM)
// A hint: without it the compiler takes fewer registers on some architectures, and spills a few.
constexpr int kLeastBlocks = 3;

// Any grid is right, and any block of whole warps up to kThreads.
extern "C" __global__ void __launch_bounds__(shardadam::kThreads, kLeastBlocks)
    shardadam_update_blocks(const __grid_constant__ shardadam::Batch batch) {
  shardadam::update_batch_by_blocks<SHARDADAM_PARAM, SHARDADAM_STATE, SHARDADAM_GRAD,
                                    SHARDADAM_FLAGS>(batch);
}
#endif
