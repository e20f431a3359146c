// CUDA for the host compiler: blocks one after the other, a block's threads as coroutines that take
// turns where they wait for each other. A shuffle or barrier that a thread of the warp (or block)
// does not come to, or comes to where the others are at another one, ends the process; so does an
// unaligned vector.
//
// What it can't show: races between warps that need no barrier here, since threads change only
// where they wait; shuffles among a part of a warp, since every lane must take part here; whether
// the compiler keeps a warp together where the text does; and anything about speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace shim {
[[noreturn]] inline void die(const char* why) {
  fprintf(stderr, "a GPU would not do this: %s\n", why);
  abort();
}
template <class Vector>
void check_aligned(const Vector* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Vector)) die("an unaligned vector");
}
}  // namespace shim

template <class Vector>
Vector __ldcs(const Vector* from) {
  shim::check_aligned(from);
  return *from;
}
template <class Vector>
void __stcs(Vector* to, Vector words) {
  shim::check_aligned(to);
  *to = words;
}

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int kLanes = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;

// Where threads of a warp, or of a block, wait for each other.
struct Barrier {
  int waiting = 0;
  unsigned long opened = 0;  // how often
  int purpose = 0;           // of those who wait
};
inline std::vector<Barrier> barriers;  // of the warps, and of the block last

union Given {
  double number;
  float single;
};
inline std::vector<Given> lanes;  // what each thread gave to a shuffle
inline unsigned long progress;    // barriers that opened, threads that ended
inline const std::function<void()>* body;

inline void run_thread() {
  (*body)();
  threads[threadIdx.x].done = true;
  ++progress;
}

inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&threads[self].context, &scheduler);
  threadIdx.x = self;
}

// `purpose` tells operations apart: threads that wait together must wait for the same one.
inline void wait_at(size_t index, int expected, int purpose) {
  Barrier& barrier = barriers[index];
  const unsigned long before = barrier.opened;
  if (barrier.waiting == 0) barrier.purpose = purpose;
  if (barrier.purpose != purpose) die("threads of a warp at different operations");
  if (++barrier.waiting == expected) {
    barrier.waiting = 0;
    ++barrier.opened;
    ++progress;
  }
  while (barrier.opened == before) yield();
}

constexpr int kBarrier = 0, kShuffle = 1;
inline void wait_for_warp(int purpose) { wait_at(threadIdx.x / kLanes, kLanes, purpose); }
inline void wait_for_block() { wait_at(barriers.size() - 1, int(blockDim.x), kBarrier); }

// A kernel whose threads never wait for each other.
inline void launch(int64_t first_block, int64_t last_block, unsigned blocks, unsigned block_threads,
                   const std::function<void()>& kernel) {
  gridDim.x = blocks;
  blockDim.x = block_threads;
  for (int64_t block = first_block; block < last_block; ++block) {
    blockIdx.x = unsigned(block);
    for (threadIdx.x = 0; threadIdx.x < block_threads; ++threadIdx.x) kernel();
  }
}

inline void run_block(unsigned block_threads) {
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.stack.resize(64 << 10);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler;
    thread.done = false;
    makecontext(&thread.context, run_thread, 0);
  }
  // In its first turn a thread comes to a barrier; if then nobody gets past one, nobody ever will.
  for (int idle = 0, left = int(block_threads); left > 0;) {
    const unsigned long before = progress;
    for (unsigned id = 0; id < block_threads; ++id)
      if (!threads[id].done) {
        threadIdx.x = id;
        swapcontext(&scheduler, &threads[id].context);
        left -= threads[id].done;
      }
    idle = progress == before ? idle + 1 : 0;
    if (idle > 1) die("a thread waits for ever");
  }
}

inline void launch_together(int64_t first_block, int64_t last_block, unsigned blocks,
                            unsigned block_threads, const std::function<void()>& kernel) {
  gridDim.x = blocks;
  blockDim.x = block_threads;
  body = &kernel;
  threads.resize(block_threads);
  for (int64_t block = first_block; block < last_block; ++block) {
    blockIdx.x = unsigned(block);
    barriers.assign((block_threads + kLanes - 1) / kLanes + 1, Barrier{});
    lanes.assign(block_threads, Given{});
    run_block(block_threads);
  }
}

template <class T>
T shuffle(T Given::* type, T value, unsigned from, int purpose) {
  const unsigned warp = threadIdx.x / kLanes * kLanes;
  lanes[threadIdx.x].*type = value;
  wait_for_warp(purpose);
  const T other = lanes[warp + (from < kLanes ? from : threadIdx.x % kLanes)].*type;
  wait_for_warp(purpose);
  return other;
}
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) die("this shim shuffles whole warps only");
}

}  // namespace shim

inline void __syncwarp() { shim::wait_for_warp(shim::kBarrier); }
inline void __syncthreads() { shim::wait_for_block(); }
inline double __shfl_down_sync(unsigned mask, double value, unsigned distance) {
  shim::check_mask(mask);
  return shim::shuffle(&shim::Given::number, value, threadIdx.x % shim::kLanes + distance,
                       shim::kShuffle + int(distance));
}
inline double __shfl_sync(unsigned mask, double value, unsigned lane) {
  shim::check_mask(mask);
  return shim::shuffle(&shim::Given::number, value, lane, shim::kShuffle);
}
inline float __shfl_xor_sync(unsigned mask, float value, unsigned lanes) {
  shim::check_mask(mask);
  return shim::shuffle(&shim::Given::single, value, threadIdx.x % shim::kLanes ^ lanes,
                       shim::kShuffle + int(shim::kLanes + lanes));
}
inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }
