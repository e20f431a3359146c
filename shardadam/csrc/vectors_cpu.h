// Vectors of numbers with the operators of a number, as wide as the instruction set has them, for
// the templates of coded_state.h. Explicit, because loops that mix 8-, 16- and 32-bit numbers spend
// their time on shuffles when a compiler vectorises them, if it does.
#pragma once

#include "params_cpu.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC's own headers start from registers that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace shardadam {
namespace SHARDADAM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T>
struct CompilersVector {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Raw = typename CompilersVector<T>::Type;

// Of float, int or uint32. A comparison gives ints: -1 where it is true, else 0.
template <class T>
struct Vector {
  Raw<T> raw;

  Vector() = default;
  SHARDADAM_FN Vector(T all) : raw(all - Raw<T>{}) {}
  SHARDADAM_FN explicit Vector(Raw<T> raw) : raw(raw) {}

  friend SHARDADAM_FN Vector operator+(Vector a, Vector b) { return Vector(a.raw + b.raw); }
  friend SHARDADAM_FN Vector operator-(Vector a, Vector b) { return Vector(a.raw - b.raw); }
  friend SHARDADAM_FN Vector operator*(Vector a, Vector b) { return Vector(a.raw * b.raw); }
  friend SHARDADAM_FN Vector operator/(Vector a, Vector b) { return Vector(a.raw / b.raw); }
  friend SHARDADAM_FN Vector operator&(Vector a, Vector b) { return Vector(a.raw & b.raw); }
  friend SHARDADAM_FN Vector operator|(Vector a, Vector b) { return Vector(a.raw | b.raw); }
  friend SHARDADAM_FN Vector operator^(Vector a, Vector b) { return Vector(a.raw ^ b.raw); }
  friend SHARDADAM_FN Vector operator<<(Vector a, int bits) { return Vector(a.raw << bits); }
  friend SHARDADAM_FN Vector operator>>(Vector a, int bits) { return Vector(a.raw >> bits); }
  friend SHARDADAM_FN Vector<int> operator<(Vector a, Vector b) {
    return Vector<int>(a.raw < b.raw);
  }
  friend SHARDADAM_FN Vector<int> operator>(Vector a, Vector b) {
    return Vector<int>(a.raw > b.raw);
  }
  friend SHARDADAM_FN Vector<int> operator==(Vector a, Vector b) {
    return Vector<int>(a.raw == b.raw);
  }
};
using Floats = Vector<float>;
using Ints = Vector<int>;
using Uints = Vector<uint32>;

// ---- coded_state.h's functions, over vectors ----------------------------------------------------

using shardadam::bits_of;
using shardadam::float_of;

template <class T>
SHARDADAM_FN Vector<T> select(Ints condition, Vector<T> yes, Vector<T> no) {
  return Vector<T>(condition.raw ? yes.raw : no.raw);
}
template <class T>
SHARDADAM_FN Vector<T> most(Vector<T> a, Vector<T> b) {
  return Vector<T>(a.raw > b.raw ? a.raw : b.raw);
}
SHARDADAM_FN Uints bits_of(Floats values) { return Uints(Raw<uint32>(values.raw)); }
SHARDADAM_FN Floats float_of(Uints bits) { return Floats(Raw<float>(bits.raw)); }
SHARDADAM_FN Ints to_int(Ints values) { return values; }
SHARDADAM_FN Ints to_int(Uints values) { return Ints(Raw<int>(values.raw)); }
SHARDADAM_FN Uints to_uint(Ints values) { return Uints(Raw<uint32>(values.raw)); }
SHARDADAM_FN Ints whole_of(Floats values) {
  return Ints(__builtin_convertvector(values.raw, Raw<int>));
}
SHARDADAM_FN Floats to_float(Ints values) {
  return Floats(__builtin_convertvector(values.raw, Raw<float>));
}
SHARDADAM_FN Floats root_of(Floats values) {
#if defined(__AVX512F__)
  return Floats(_mm512_sqrt_ps(values.raw));
#elif defined(__AVX2__)
  return Floats(_mm256_sqrt_ps(values.raw));
#else
  for (int i = 0; i < kLanes; ++i) values.raw[i] = sqrtf(values.raw[i]);
  return values;
#endif
}

// ---- memory -------------------------------------------------------------------------------------

template <class T>
SHARDADAM_FN Vector<T> load(const T* from) {
  Vector<T> values;
  __builtin_memcpy(&values.raw, from, sizeof values.raw);
  return values;
}
template <class T>
SHARDADAM_FN void store(T* to, Vector<T> values) {
  __builtin_memcpy(to, &values.raw, sizeof values.raw);
}

// Codes of 8 or 16 bits, as ints, of which the lower bits are stored.
template <class Code>
SHARDADAM_FN Ints load_codes(const Code* from) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Code) == 2)
    return Ints(Raw<int>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u*)from))));
  const __m128i bytes = _mm_loadu_si128((const __m128i_u*)from);
  return Ints(Raw<int>(Code(-1) < 0 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes)));
#elif defined(__AVX2__)
  if constexpr (sizeof(Code) == 2)
    return Ints(Raw<int>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u*)from))));
  const __m128i bytes = _mm_loadl_epi64((const __m128i_u*)from);
  return Ints(Raw<int>(Code(-1) < 0 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes)));
#else
  Raw<Code> codes;
  __builtin_memcpy(&codes, from, sizeof codes);
  return Ints(__builtin_convertvector(codes, Raw<int>));
#endif
}
template <class Code>
SHARDADAM_FN void store_codes(Code* to, Ints values) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Code) == 2)
    _mm256_storeu_si256((__m256i_u*)to, _mm512_cvtepi32_epi16(__m512i(values.raw)));
  else
    _mm_storeu_si128((__m128i_u*)to, _mm512_cvtepi32_epi8(__m512i(values.raw)));
#elif defined(__AVX2__)
  // The lower bytes of each half's ints come together in it, then those of both halves.
  const __m256i halves =
      sizeof(Code) == 2
          ? _mm256_shuffle_epi8(__m256i(values.raw), _mm256_set1_epi64x(0x0d0c090805040100))
          : _mm256_shuffle_epi8(__m256i(values.raw), _mm256_set1_epi32(0x0c080400));
  if constexpr (sizeof(Code) == 2)
    _mm_storeu_si128((__m128i_u*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 8)));
  else
    _mm_storel_epi64((__m128i_u*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(halves),
                                                        _mm256_extracti128_si256(halves, 1)));
#else
  const Raw<Code> codes = __builtin_convertvector(values.raw, Raw<Code>);
  __builtin_memcpy(to, &codes, sizeof codes);
#endif
}

// lane_bits() of a block's elements.
struct LaneBits {
  alignas(64) uint32 at[kBlock];
  constexpr LaneBits() : at() {
    for (int i = 0; i < kBlock; ++i) at[i] = lane_bits(uint32(i));
  }
};
constexpr LaneBits kLaneBits;

SHARDADAM_FN uint32 largest_of(Uints values) {
  uint32 largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = values.raw[i] > largest ? values.raw[i] : largest;
  return largest;
}

}  // namespace SHARDADAM_ISA
}  // namespace shardadam
