// The norm of gradients on a GPU, as an exact sum of squares: exact_sum.h.
//
// NVRTC compiles this text for each (architecture, SHARDADAM_GRAD) in use. Deterministic: the only
// atomic operations are additions of integers.
#include "batch_cuda.h"
#include "exact_sum.h"
#include "formats.h"

namespace shardadam {

constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
static_assert(kElementsOfPart % kSumBlock == 0, "a block of the sum lies within a part");

template <class Grad>
SHARDADAM_FN double square_at(const Grad* grad, int64 index, int64 numel) {
  const double value = index < numel ? decode(grad[index]) : 0;
  return value * value;
}

// Adds the squares of all pieces to `words`. Each warp keeps a sum of its own until the end.
template <int kGrad>
SHARDADAM_FN void sum_squares(const Pieces& pieces, unsigned long long* words) {
  using Grad = typename GradType<kGrad>::Type;
  __shared__ int64 sums[kWarps][kSumWords];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int word = lane; word < kSumWords; word += kLanes) sums[warp][word] = 0;
  __syncwarp();
  for (uint32 part = blockIdx.x; part < pieces.first_part[pieces.count]; part += gridDim.x) {
    const int piece = piece_of(pieces, part);
    const Grad* grad = static_cast<const Grad*>(pieces.values[piece]);
    const int64 numel = pieces.numel[piece];
    const int64 begin = int64(part - pieces.first_part[piece]) * kElementsOfPart;
    const int64 end = begin + kElementsOfPart < numel ? begin + kElementsOfPart : numel;
    for (int64 start = begin + warp * kSumBlock; start < end; start += kWarps * kSumBlock) {
      const int64 first = start + lane;
      double sum = (square_at(grad, first, numel) + square_at(grad, first + 64, numel)) +
                   (square_at(grad, first + 32, numel) + square_at(grad, first + 96, numel));
      for (int half = kLanes / 2; half > 0; half /= 2)
        sum = sum + __shfl_down_sync(0xffffffffu, sum, half);
      const Terms terms = terms_of(__shfl_sync(0xffffffffu, sum, 0));
      // No indexing by lane: it would put the three into local memory.
      const int64 term = lane == 0 ? terms.at[0] : lane == 1 ? terms.at[1] : terms.at[2];
      if (lane < 3) sums[warp][terms.word + lane] += term;
      __syncwarp();
    }
  }
  __syncthreads();
  for (int word = threadIdx.x; word < kSumWords; word += kThreads) {
    int64 total = 0;
    for (int w = 0; w < kWarps; ++w) total += sums[w][word];
    if (total) atomicAdd(words + word, static_cast<unsigned long long>(total));
  }
}

}  // namespace shardadam

#if defined(SHARDADAM_GRAD)
extern "C" __global__ void __launch_bounds__(shardadam::kThreads)
    shardadam_sum_squares(const __grid_constant__ shardadam::Pieces pieces,
                          unsigned long long* words) {
  shardadam::sum_squares<SHARDADAM_GRAD>(pieces, words);
}
#endif

// The square root of the sum. One thread.
extern "C" __global__ void shardadam_root(const long long* words, double* root) {
  *root = sqrt(shardadam::rounded_sum(words));
}
