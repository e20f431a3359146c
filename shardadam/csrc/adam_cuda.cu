// The update of runs on a GPU: loops over adam_update.h and nothing of the rule.
//
// NVRTC compiles this text for each (architecture, SHARDADAM_PARAM, SHARDADAM_GRAD,
// SHARDADAM_FLAGS) in use: numbers of the enums in formats.h. Tests compile it with the host
// compiler too, blocks and threads as loops.
#include "adam_update.h"
#include "batch_cuda.h"
#include "formats.h"

namespace shardadam {

constexpr int kBytes = 16;  // of one load or store

// Runs of one bucket: piece i's elements start at element start[i] of the bucket's shard, and its
// coefficients are coefficients[coefficient[i]], read on the device: they may be written by a
// kernel before this one, and anew between the replays of a CUDA graph. The layout is shared with
// kernels/cuda_arguments.py.
struct Batch {
  Pieces grads;
  int64 start[kPieces];
  int coefficient[kPieces];
  void* param;
  void* master;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  const Coefficients* coefficients;
  const float* skip;  // where it is not 0 nothing is updated; may be null
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments");

// ---- memory -------------------------------------------------------------------------------------

// N elements that lie together, in accesses of 16 bytes. All of it is streamed: a step reads and
// writes more than any cache holds, each byte once. (A hint also keeps an access whole: plain
// assignments of doubles become two of 8 bytes.)
template <int N, class T>
SHARDADAM_FN void load(T (&values)[N], const T* from) {
  if constexpr (N == 1) {
    values[0] = *from;
  } else {
    constexpr int kLoads = N * sizeof(T) / kBytes;
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
    copy_bits(values, words);
  }
}

template <int N, class T>
SHARDADAM_FN void store(T* to, const T (&values)[N]) {
  if constexpr (N == 1) {
    *to = values[0];
  } else {
    constexpr int kStores = N * sizeof(T) / kBytes;
    uint4 words[kStores];
    copy_bits(words, values);
#pragma unroll
    for (int i = 0; i < kStores; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
}

SHARDADAM_FN bool aligned(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer) % kBytes == 0;
}

// ---- formats ------------------------------------------------------------------------------------
// `load` gives master weights, `store` puts them back.

template <class T>
struct Plain {
  using Moment = T;
  static constexpr int kSmallest = sizeof(T);  // bytes of an element of its smallest operand
  T* param;

  SHARDADAM_FN Plain(void* param, void*, int64 start) : param(static_cast<T*>(param) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const { return aligned(param + index); }
  template <int N>
  SHARDADAM_FN void load(int64 index, T (&masters)[N]) const {
    shardadam::load(masters, param + index);
  }
  template <int N>
  SHARDADAM_FN void store(int64 index, const T (&masters)[N]) const {
    shardadam::store(param + index, masters);
  }
};

struct Bf16Split {
  using Moment = float;
  static constexpr int kSmallest = 2;
  uint16* param;
  int16* remainder;

  SHARDADAM_FN Bf16Split(void* param, void* master, int64 start)
      : param(static_cast<uint16*>(param) + start),
        remainder(static_cast<int16*>(master) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(param + index) && aligned(remainder + index);
  }
  template <int N>
  SHARDADAM_FN void load(int64 index, float (&masters)[N]) const {
    uint16 high[N];
    int16 low[N];
    shardadam::load(high, param + index);
    shardadam::load(low, remainder + index);
#pragma unroll
    for (int i = 0; i < N; ++i) masters[i] = master_of({high[i], low[i]});
  }
  template <int N>
  SHARDADAM_FN void store(int64 index, const float (&masters)[N]) const {
    uint16 high[N];
    int16 low[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Split split = split_of(masters[i]);
      high[i] = split.param;
      low[i] = split.remainder;
    }
    shardadam::store(param + index, high);
    shardadam::store(remainder + index, low);
  }
};

// A param of type Half (Bf16, Fp16) beside an fp32 copy.
template <class Half>
struct WithMaster {
  using Moment = float;
  static constexpr int kSmallest = 2;
  Half* param;
  float* master;

  SHARDADAM_FN WithMaster(void* param, void* master, int64 start)
      : param(static_cast<Half*>(param) + start), master(static_cast<float*>(master) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(param + index) && aligned(master + index);
  }
  template <int N>
  SHARDADAM_FN void load(int64 index, float (&masters)[N]) const {
    Half rounded[N];
    shardadam::load(rounded, param + index);
    shardadam::load(masters, master + index);
#pragma unroll
    for (int i = 0; i < N; ++i) masters[i] = current_master(masters[i], rounded[i]);
  }
  template <int N>
  SHARDADAM_FN void store(int64 index, const float (&masters)[N]) const {
    Half rounded[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rounded[i] = Half::of(masters[i]);
    shardadam::store(param + index, rounded);
    shardadam::store(master + index, masters);
  }
};

template <int kFormat>
struct ParamType;
template <>
struct ParamType<kFloat32> {
  using Type = Plain<float>;
};
template <>
struct ParamType<kFloat64> {
  using Type = Plain<double>;
};
template <>
struct ParamType<kBf16Split> {
  using Type = Bf16Split;
};
template <>
struct ParamType<kBf16Master> {
  using Type = WithMaster<Bf16>;
};
template <>
struct ParamType<kFp16Master> {
  using Type = WithMaster<Fp16>;
};

// ---- the loops ----------------------------------------------------------------------------------

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
    if (grad_is_aligned) {
      load(grads, grad + index);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) grads[i] = grad[index + i];
    }
    format.load(index, masters);
    load(averages, exp_avg + index);
    load(squares, exp_avg_sq + index);
    if constexpr (kAmsgrad) load(largest, max_exp_avg_sq + index);
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
    format.store(index, masters);
    store(exp_avg + index, averages);
    store(exp_avg_sq + index, squares);
    if constexpr (kAmsgrad) store(max_exp_avg_sq + index, largest);
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
