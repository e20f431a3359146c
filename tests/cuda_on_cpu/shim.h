// CUDA for the host compiler: blocks one after the other, a block's threads as coroutines that take
// turns where they wait for each other. What it can't show: races between warps that need no
// barrier here, what the hardware makes of unaligned vectors, and anything about speed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
// An unaligned vector is a fault on a GPU.
inline void check_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) abort();
}
inline uint4 __ldcs(const uint4* from) {
  check_aligned(from);
  return *from;
}
inline void __stcs(uint4* to, uint4 words) {
  check_aligned(to);
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
inline std::vector<int> waiting;  // threads at the barrier, per warp, and of the block last
inline std::vector<unsigned long> opened;  // how often each barrier has opened
inline std::vector<double> lanes;          // what each thread gave to a shuffle
inline const std::function<void()>* body;

inline void run_thread() {
  (*body)();
  threads[threadIdx.x].done = true;
}

inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&threads[self].context, &scheduler);
  threadIdx.x = self;
}

inline void wait_at(size_t barrier, int expected) {
  const unsigned long before = opened[barrier];
  if (++waiting[barrier] == expected) {
    waiting[barrier] = 0;
    ++opened[barrier];
  }
  while (opened[barrier] == before) yield();
}

inline void wait_for_warp() { wait_at(threadIdx.x / kLanes, kLanes); }
inline void wait_for_block() { wait_at(waiting.size() - 1, int(blockDim.x)); }

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

inline void launch_together(unsigned blocks, unsigned block_threads,
                            const std::function<void()>& kernel) {
  gridDim.x = blocks;
  blockDim.x = block_threads;
  body = &kernel;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    threads = std::vector<Thread>(block_threads);
    waiting.assign(block_threads / kLanes + 1, 0);
    opened.assign(block_threads / kLanes + 1, 0);
    lanes.assign(block_threads, 0);
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.stack.resize(64 << 10);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, run_thread, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (unsigned id = 0; id < block_threads; ++id)
        if (!threads[id].done) {
          threadIdx.x = id;
          swapcontext(&scheduler, &threads[id].context);
          any = true;
        }
    }
  }
}

inline double shuffle(double value, unsigned from) {
  const unsigned warp = threadIdx.x / kLanes * kLanes;
  lanes[threadIdx.x] = value;
  wait_for_warp();
  const double other = lanes[warp + (from < kLanes ? from : threadIdx.x % kLanes)];
  wait_for_warp();
  return other;
}

}  // namespace shim

inline void __syncwarp() { shim::wait_for_warp(); }
inline void __syncthreads() { shim::wait_for_block(); }
inline double __shfl_down_sync(unsigned, double value, unsigned distance) {
  return shim::shuffle(value, threadIdx.x % shim::kLanes + distance);
}
inline double __shfl_sync(unsigned, double value, unsigned lane) {
  return shim::shuffle(value, lane);
}
inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }
