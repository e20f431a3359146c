// Random bits for stochastic rounding that depend on seed, step and element, and on nothing else:
// not on the world size, the device, or where a shard is cut. The same integers as
// kernels/random_bits.py.
#pragma once

#include "portable.h"

namespace shardadam {

// State that is coded, and params that are rounded stochastically, go by blocks of this many
// elements, counted in the param's own coordinates.
constexpr int kBlock = 128;

enum Stream : int { kStreamState, kStreamParam };

// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
SHARDADAM_FN uint64 mix64(uint64 value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

// What the blocks of one step and stream have in common.
SHARDADAM_FN uint64 stream_key(int64 seed, double step, Stream stream) {
  return mix64(mix64(uint64(seed)) + 2 * uint64(int64(step)) + uint64(stream));
}

SHARDADAM_FN uint64 block_key(uint64 stream_key, int64 block) {
  return mix64(stream_key + uint64(block));
}

// What tells a block's elements apart.
SHARDADAM_FN constexpr uint32 lane_bits(uint32 lane) { return lane * 0x9e3779b9u; }

// 32 bits from the key of a block and the bits of a lane, the upper ones the better: two rounds of
// multiplication by MurmurHash3's factors (Appleby), so few that rounding to nearest would hardly
// be faster. For one element or a vector of them.
template <class Uint>
SHARDADAM_FN Uint mixed_bits(uint32 key, Uint lane) {
  const Uint bits = (key ^ lane) * 0x85ebca6bu;
  return (bits ^ (bits >> 15)) * 0xc2b2ae35u;
}

SHARDADAM_FN uint32 random_bits(uint64 block_key, uint32 lane) {
  return mixed_bits(uint32(block_key), lane_bits(lane));
}

}  // namespace shardadam
