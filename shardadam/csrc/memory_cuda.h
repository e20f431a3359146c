// How a thread of a CUDA kernel reads and writes elements that lie together.
#pragma once

#include "portable.h"

namespace shardadam {

constexpr int kBytes = 16;  // of one load or store, where there are as many

// All N elements, in as few accesses as there are. All of it is streamed: a step reads and writes
// more than any cache holds, each byte once. (A hint also keeps an access whole: plain assignments
// of doubles become two of 8 bytes.)
struct Whole {
  template <int N, class T>
  SHARDADAM_FN void load(T (&values)[N], const T* from) const {
    if constexpr (N == 1) {
      values[0] = *from;
    } else if constexpr (N * sizeof(T) < kBytes) {
      static_assert(N * sizeof(T) == sizeof(uint2), "8 bytes");
      const uint2 word = __ldcs(reinterpret_cast<const uint2*>(from));
      copy_bits(values, word);
    } else {
      constexpr int kLoads = N * sizeof(T) / kBytes;
      uint4 words[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      copy_bits(values, words);
    }
  }

  template <int N, class T>
  SHARDADAM_FN void store(T* to, const T (&values)[N]) const {
    if constexpr (N == 1) {
      *to = values[0];
    } else if constexpr (N * sizeof(T) < kBytes) {
      uint2 word;
      copy_bits(word, values);
      __stcs(reinterpret_cast<uint2*>(to), word);
    } else {
      constexpr int kStores = N * sizeof(T) / kBytes;
      uint4 words[kStores];
      copy_bits(words, values);
#pragma unroll
      for (int i = 0; i < kStores; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
    }
  }
};

// The first `count` of N elements, one by one; as if zeros came after them.
struct OneByOne {
  int count;

  template <int N, class T>
  SHARDADAM_FN void load(T (&values)[N], const T* from) const {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = i < count ? from[i] : T{};
  }

  template <int N, class T>
  SHARDADAM_FN void store(T* to, const T (&values)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = values[i];
  }
};

SHARDADAM_FN bool aligned(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer) % kBytes == 0;
}

}  // namespace shardadam
