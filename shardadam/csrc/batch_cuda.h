// What one launch works on: many contiguous pieces, cut into equal parts, one for a block at a
// time. Passed by value (under the 4 KiB that every architecture takes): no table has to be
// uploaded, and a CUDA graph keeps its own copy. Layouts and numbers are shared with
// kernels/cuda_arguments.py.
#pragma once

#include "adam_update.h"

namespace shardadam {

constexpr int kThreads = 128;
constexpr int kPieces = 96;
constexpr int kElementsOfPart = 8192;

// Piece i is `values[i]`, `numel[i]` elements, parts first_part[i] up to first_part[i + 1].
struct Pieces {
  const void* values[kPieces];
  int64 numel[kPieces];
  uint32 first_part[kPieces + 1];
  int count;
};

// The piece that a part belongs to. The same for a whole block.
SHARDADAM_FN int piece_of(const Pieces& pieces, uint32 part) {
  int low = 0, high = pieces.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (part < pieces.first_part[middle] ? high : low) = middle;
  }
  return low;
}

// Runs of one bucket: piece i's elements start at element start[i] of the bucket's shard, and its
// coefficients are coefficients[coefficient[i]], read on the device: they may be written by a
// kernel before this one, and anew between the replays of a CUDA graph. Runs that go by blocks of
// 128 elements have their scales from block start[i] / 128 of the shard on, and random bits by
// `seed` and block numbers from first_block[i] on.
struct Batch {
  Pieces grads;
  int64 start[kPieces];
  int64 first_block[kPieces];
  int coefficient[kPieces];
  void* param;
  void* master;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  uint16* exp_avg_scale;  // bf16
  uint16* exp_avg_sq_scale;
  uint16* max_exp_avg_sq_scale;
  const Coefficients* coefficients;
  const float* skip;  // where it is not 0 nothing is updated; may be null
  int64 seed;
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments");

}  // namespace shardadam
