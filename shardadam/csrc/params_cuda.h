// Params in every format, as a thread of a CUDA kernel reads and writes them. `load` gives master
// weights, `store` puts them back; `access` is one of memory_cuda.h's.
#pragma once

#include "coded_state.h"
#include "memory_cuda.h"

namespace shardadam {

template <class T>
struct Plain {
  using Moment = T;
  static constexpr int kSmallest = sizeof(T);  // bytes of an element of its smallest operand
  static constexpr bool kStochastic = false;
  T* param;

  SHARDADAM_FN Plain(void* param, void*, int64 start) : param(static_cast<T*>(param) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const { return aligned(param + index); }
  template <int N, class Access>
  SHARDADAM_FN void load(Access access, int64 index, T (&masters)[N]) const {
    access.load(masters, param + index);
  }
  template <int N, class Access>
  SHARDADAM_FN void store(Access access, int64 index, const T (&masters)[N]) const {
    access.store(param + index, masters);
  }
};

// A bf16 param and the rest of its master, in integers of type Remainder.
template <class Remainder>
struct Bf16WithRemainder {
  using Moment = float;
  static constexpr int kSmallest = sizeof(Remainder);
  uint16* param;
  Remainder* remainder;

  SHARDADAM_FN Bf16WithRemainder(void* param, void* master, int64 start)
      : param(static_cast<uint16*>(param) + start),
        remainder(static_cast<Remainder*>(master) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(param + index) && aligned(remainder + index);
  }

 protected:
  template <class Split, int N, class Access>
  SHARDADAM_FN void join(Access access, int64 index, float (&masters)[N]) const {
    uint16 high[N];
    Remainder low[N];
    access.load(high, param + index);
    access.load(low, remainder + index);
#pragma unroll
    for (int i = 0; i < N; ++i) masters[i] = master_of(Split{high[i], low[i]});
  }
  template <class Split, int N, class Access>
  SHARDADAM_FN void put(Access access, int64 index, const Split (&splits)[N]) const {
    uint16 high[N];
    Remainder low[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      high[i] = splits[i].param;
      low[i] = splits[i].remainder;
    }
    access.store(param + index, high);
    access.store(remainder + index, low);
  }
};

struct Bf16Split : Bf16WithRemainder<int16> {
  using Bf16WithRemainder::Bf16WithRemainder;
  static constexpr bool kStochastic = false;
  template <int N, class Access>
  SHARDADAM_FN void load(Access access, int64 index, float (&masters)[N]) const {
    join<Split>(access, index, masters);
  }
  template <int N, class Access>
  SHARDADAM_FN void store(Access access, int64 index, const float (&masters)[N]) const {
    Split splits[N];
#pragma unroll
    for (int i = 0; i < N; ++i) splits[i] = split_of(masters[i]);
    put(access, index, splits);
  }
};

struct Bf16Split8 : Bf16WithRemainder<int8> {
  using Bf16WithRemainder::Bf16WithRemainder;
  static constexpr bool kStochastic = true;
  template <int N, class Access>
  SHARDADAM_FN void load(Access access, int64 index, float (&masters)[N]) const {
    join<Split8>(access, index, masters);
  }
  template <int N, class Access>
  SHARDADAM_FN void store(Access access, int64 index, const float (&masters)[N],
                          const uint32 (&random)[N]) const {
    Split8 splits[N];
#pragma unroll
    for (int i = 0; i < N; ++i) splits[i] = split8_of(masters[i], random[i]);
    put(access, index, splits);
  }
};

struct Bf16Only {
  static constexpr bool kStochastic = true;
  uint16* param;

  SHARDADAM_FN Bf16Only(void* param, void*, int64 start)
      : param(static_cast<uint16*>(param) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const { return aligned(param + index); }
  template <int N, class Access>
  SHARDADAM_FN void load(Access access, int64 index, float (&masters)[N]) const {
    uint16 rounded[N];
    access.load(rounded, param + index);
#pragma unroll
    for (int i = 0; i < N; ++i) masters[i] = float_of_bf16(rounded[i]);
  }
  template <int N, class Access>
  SHARDADAM_FN void store(Access access, int64 index, const float (&masters)[N],
                          const uint32 (&random)[N]) const {
    uint16 rounded[N];
#pragma unroll
    for (int i = 0; i < N; ++i)
      rounded[i] = uint16(stochastic_bits<16>(masters[i], random[i]) >> 16);
    access.store(param + index, rounded);
  }
};

// A param of type Half (Bf16, Fp16) beside an fp32 copy.
template <class Half>
struct WithMaster {
  using Moment = float;
  static constexpr int kSmallest = 2;
  static constexpr bool kStochastic = false;
  Half* param;
  float* master;

  SHARDADAM_FN WithMaster(void* param, void* master, int64 start)
      : param(static_cast<Half*>(param) + start), master(static_cast<float*>(master) + start) {}
  SHARDADAM_FN bool is_aligned(int64 index) const {
    return aligned(param + index) && aligned(master + index);
  }
  template <int N, class Access>
  SHARDADAM_FN void load(Access access, int64 index, float (&masters)[N]) const {
    Half rounded[N];
    access.load(rounded, param + index);
    access.load(masters, master + index);
#pragma unroll
    for (int i = 0; i < N; ++i) masters[i] = current_master(masters[i], rounded[i]);
  }
  template <int N, class Access>
  SHARDADAM_FN void store(Access access, int64 index, const float (&masters)[N]) const {
    Half rounded[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rounded[i] = Half::of(masters[i]);
    access.store(param + index, rounded);
    access.store(master + index, masters);
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
template <>
struct ParamType<kBf16Split8> {
  using Type = Bf16Split8;
};
template <>
struct ParamType<kBf16Only> {
  using Type = Bf16Only;
};

}  // namespace shardadam
