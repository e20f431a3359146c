// What one launch works on: many contiguous pieces, cut into equal parts, one for a block at a
// time. Passed by value (under the 4 KiB that every architecture takes): no table has to be
// uploaded, and a CUDA graph keeps its own copy.
#pragma once

#include "portable.h"

namespace shardadam {

constexpr int kThreads = 128;
constexpr int kPieces = 120;
constexpr int kElementsOfPart = 8192;  // kernels/cuda_arguments.py has the same three

// The layout is shared with kernels/cuda_arguments.py. Piece i is `values[i]`, `numel[i]` elements,
// parts first_part[i] up to first_part[i + 1].
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

}  // namespace shardadam
