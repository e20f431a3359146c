// The update of runs on a GPU: loops over adam_update.h and nothing of the rule.
//
// NVRTC compiles this text for each (architecture, SHARDADAM_PARAM, SHARDADAM_GRAD,
// SHARDADAM_FLAGS) in use: numbers of the enums in formats.h. Tests compile it with the host
// compiler too, blocks and threads as loops.
#include "batch_cuda.h"
#include "params_cuda.h"

namespace shardadam {

template <class Format, class Grad, int kFlags>
struct Run {
  using Moment = typename Format::Moment;
  static constexpr bool kAmsgrad = kFlags & kFlagAmsgrad;
  static constexpr bool kNesterov = kFlags & kFlagNesterov;
  static constexpr bool kL2 = kFlags & kFlagL2;
  static constexpr int kSmallest =
      sizeof(Grad) < Format::kSmallest ? sizeof(Grad) : Format::kSmallest;
  // Elements at a time: every operand in whole loads, and enough of them under way.
  static constexpr int kVector = kSmallest == 2 ? kBytes / 2 : 2 * kBytes / kSmallest;
  static constexpr int kVectorsOfPart = kElementsOfPart / kVector;

  Format format;
  const Grad* grad;
  Moment* exp_avg;
  Moment* exp_avg_sq;
  Moment* max_exp_avg_sq;
  int64 numel;

  SHARDADAM_FN Run(const Batch& batch, int piece)
      : format(batch.param, batch.master, batch.start[piece]),
        grad(static_cast<const Grad*>(batch.grads.values[piece])),
        exp_avg(static_cast<Moment*>(batch.exp_avg) + batch.start[piece]),
        exp_avg_sq(static_cast<Moment*>(batch.exp_avg_sq) + batch.start[piece]),
        max_exp_avg_sq(kAmsgrad ? static_cast<Moment*>(batch.max_exp_avg_sq) + batch.start[piece]
                                : nullptr),
        numel(batch.grads.numel[piece]) {}

  // How many elements come before the first at which all of the state can be loaded 16 bytes at a
  // time; all, if there is none.
  SHARDADAM_FN int64 head() const {
    for (int64 i = 0; i < kVector && i < numel; ++i)
      if (format.is_aligned(i) && aligned(exp_avg + i) && aligned(exp_avg_sq + i) &&
          (!kAmsgrad || aligned(max_exp_avg_sq + i)))
        return i;
    return numel;
  }

  template <int N>
  SHARDADAM_FN void update(int64 index, bool grad_is_aligned, const Coefficients& c) const {
    Grad grads[N];
    Moment masters[N], averages[N], squares[N], largest[N];
    const Whole whole;
    if (grad_is_aligned)
      whole.load(grads, grad + index);
    else
      OneByOne{N}.load(grads, grad + index);
    format.load(whole, index, masters);
    whole.load(averages, exp_avg + index);
    whole.load(squares, exp_avg_sq + index);
    if constexpr (kAmsgrad) whole.load(largest, max_exp_avg_sq + index);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Element x{masters[i], averages[i], squares[i], 0};
      if constexpr (kAmsgrad) x.max_exp_avg_sq = largest[i];
      shardadam::update<kAmsgrad, kNesterov, kL2>(x, decode(grads[i]), c);
      masters[i] = Moment(x.param);
      averages[i] = Moment(x.exp_avg);
      squares[i] = Moment(x.exp_avg_sq);
      if constexpr (kAmsgrad) largest[i] = Moment(x.max_exp_avg_sq);
    }
    format.store(whole, index, masters);
    whole.store(exp_avg + index, averages);
    whole.store(exp_avg_sq + index, squares);
    if constexpr (kAmsgrad) whole.store(max_exp_avg_sq + index, largest);
  }

  // This thread's share of part `part` of `parts`: vectors of the part, and of the single elements
  // before and after all vectors.
  SHARDADAM_FN void update_part(int64 part, int64 parts, const Coefficients& c) const {
    const int64 first = head();
    const int64 vectors = (numel - first) / kVector;
    const int64 rest = first + vectors * kVector;
    const bool grad_is_aligned = aligned(grad + first);
    const int64 end = (part + 1) * kVectorsOfPart;
    for (int64 i = part * kVectorsOfPart + threadIdx.x; i < end && i < vectors; i += blockDim.x)
      update<kVector>(first + i * kVector, grad_is_aligned, c);
    const int64 singles = first + (numel - rest);
    for (int64 i = part * blockDim.x + threadIdx.x; i < singles; i += parts * blockDim.x)
      update<1>(i < first ? i : rest + (i - first), true, c);
  }
};

template <int kParam, int kGrad, int kFlags>
SHARDADAM_FN void update_batch(const Batch& batch) {
  using Format = typename ParamType<kParam>::Type;
  using Grad = typename GradType<kGrad>::Type;
  if (batch.skip && *batch.skip != 0) return;
  const uint32* first_part = batch.grads.first_part;
  for (uint32 part = blockIdx.x; part < first_part[batch.grads.count]; part += gridDim.x) {
    const int piece = piece_of(batch.grads, part);
    const Run<Format, Grad, kFlags> run(batch, piece);
    const Coefficients c = batch.coefficients[batch.coefficient[piece]];
    run.update_part(part - first_part[piece], first_part[piece + 1] - first_part[piece], c);
  }
}

}  // namespace shardadam

#if defined(SHARDADAM_PARAM)
// Without a lower bound the compiler keeps registers few, which is best for all but NAdam with L2
// decay: there it then spills one on some architectures.
constexpr int kLeastBlocks =
    SHARDADAM_FLAGS == (shardadam::kFlagNesterov | shardadam::kFlagL2) ? 3 : 0;

// Any grid and any block of up to kThreads are right.
extern "C" __global__ void __launch_bounds__(shardadam::kThreads, kLeastBlocks)
    shardadam_update(const __grid_constant__ shardadam::Batch batch) {
  shardadam::update_batch<SHARDADAM_PARAM, SHARDADAM_GRAD, SHARDADAM_FLAGS>(batch);
}
#endif
