// What the host compiler and NVRTC, which has no standard headers, need to read the same text.
#pragma once

#if defined(__CUDACC__)
#define SHARDADAM_FN __device__ __forceinline__
#else
#define SHARDADAM_FN inline __attribute__((always_inline))
#endif

namespace shardadam {

using uint8 = unsigned char;
using int8 = signed char;
using uint16 = unsigned short;
using int16 = short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;
static_assert(sizeof(uint16) == 2 && sizeof(uint32) == 4 && sizeof(int64) == 8, "fixed widths");

// The same bytes, as another type of the same size.
template <class To, class From>
SHARDADAM_FN void copy_bits(To& to, const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
#if defined(__CUDACC__)
  memcpy(&to, &from, sizeof(To));
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
}

}  // namespace shardadam
