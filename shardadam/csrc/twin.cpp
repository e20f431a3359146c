// The CPU twin's entry points: plain C, raw pointers, no torch ABI. Picks the best instruction set
// that this processor has and spreads the work over threads.
#include "twin.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace shardadam {
namespace {

// Under this many elements a thread costs more to start than it saves.
constexpr int64_t kElementsPerThread = int64_t(1) << 16;
constexpr int64_t kCut = 128;

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
#endif

// The loops that were built and that this processor can run, the best first.
std::vector<const Loops*> usable_loops() {
  std::vector<const Loops*> usable;
#if defined(SHARDADAM_HAVE_AVX512)
  if (has_avx512()) usable.push_back(&loops_avx512());
#endif
#if defined(SHARDADAM_HAVE_AVX2)
  if (has_avx2()) usable.push_back(&loops_avx2());
#endif
  usable.push_back(&loops_baseline());
  return usable;
}

const Loops*& loops() {
  static const Loops* chosen = usable_loops().front();
  return chosen;
}

// torch's OpenMP pool, if Python handed it over: its idle workers spin for milliseconds, and would
// compete for the cores with threads of our own.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};
OpenMp openmp;

// Calls work(part, begin, end) with [0, total) cut into `parts` ranges, in parallel.
template <class Work>
void parallel(int64_t total, int32_t parts, Work work) {
  const int64_t step = (total / parts + kCut) / kCut * kCut;
  const auto run = [&](int32_t part) {
    const int64_t begin = std::min(total, step * part);
    work(part, begin, std::min(total, begin + step));
  };
  if (parts == 1) return run(0);
  if (openmp.parallel) {
    struct Body {
      const decltype(run)& part;
      int32_t parts;
      static void main(void* data) {
        const Body& body = *static_cast<Body*>(data);
        // OpenMP may give fewer threads than were asked for.
        for (int32_t i = openmp.thread_num(); i < body.parts; i += openmp.num_threads())
          body.part(i);
      }
    } body{run, parts};
    return openmp.parallel(Body::main, &body, unsigned(parts), 0);
  }
  std::vector<std::thread> threads;
  threads.reserve(size_t(parts));
  for (int32_t part = 1; part < parts; ++part) {
    try {
      threads.emplace_back(run, part);
    } catch (const std::system_error&) {
      run(part);  // the system refuses another thread
    }
  }
  run(0);
  for (std::thread& thread : threads) thread.join();
}

int32_t parts_for(int64_t total, int32_t threads) {
  const int64_t useful = total / kElementsPerThread;
  return int32_t(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
}

// Walks the part of each of `count` ranges that lies in [begin, end) of all of them in a row.
template <class Numel, class Visit>
void walk(int64_t count, Numel numel, int64_t begin, int64_t end, Visit visit) {
  int64_t start = 0;
  for (int64_t index = 0; index < count && start < end; ++index) {
    const int64_t size = numel(index);
    const int64_t first = std::max(begin - start, int64_t(0)), last = std::min(end - start, size);
    if (first < last) visit(index, first, last);
    start += size;
  }
}

}  // namespace
}  // namespace shardadam

using namespace shardadam;

EXPORT int32_t shardadam_abi_version() { return kAbiVersion; }

EXPORT const char* shardadam_isa() { return loops()->name; }

// For tests: run the loops of another instruction set. 1 if this processor can't.
EXPORT int32_t shardadam_use_isa(const char* name) {
  for (const Loops* usable : usable_loops())
    if (!std::strcmp(usable->name, name)) return loops() = usable, 0;
  return 1;
}

// Hands over GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP that is
// loaded.
EXPORT void shardadam_use_openmp(void* parallel, void* thread_num, void* num_threads) {
  openmp.parallel = reinterpret_cast<decltype(OpenMp::parallel)>(parallel);
  openmp.thread_num = reinterpret_cast<decltype(OpenMp::thread_num)>(thread_num);
  openmp.num_threads = reinterpret_cast<decltype(OpenMp::num_threads)>(num_threads);
}

// Updates `count` runs with their gradients and coefficients. Returns 0, or 1 + the index of the
// first run whose formats are unknown, in which case nothing was changed.
EXPORT int64_t shardadam_update(const Run* const* runs, const void* const* grads,
                                const Coefficients* const* coefficients, int64_t count,
                                int32_t threads) {
  const Loops& isa = *loops();
  std::vector<UpdateRange> updates;
  updates.reserve(size_t(count));
  int64_t total = 0;
  for (int64_t index = 0; index < count; ++index) {
    const Run& run = *runs[index];
    const Coefficients& c = *coefficients[index];
    const int32_t flags = (run.max_exp_avg_sq ? kFlagAmsgrad : 0) |
                          (c.grad_to_update != 0 ? kFlagNesterov : 0) | (c.l2 != 0 ? kFlagL2 : 0);
    updates.push_back(by_blocks(run) ? isa.update_blocks(run.state_format, run.param_format,
                                                         run.grad_format, flags)
                                     : isa.update(run.param_format, run.grad_format, flags));
    if (!updates.back()) return 1 + index;
    total += run.numel;
  }
  parallel(total, parts_for(total, threads), [&](int32_t, int64_t begin, int64_t end) {
    walk(
        count, [&](int64_t index) { return runs[index]->numel; }, begin, end,
        [&](int64_t index, int64_t first, int64_t last) {
          const Run& run = *runs[index];
          if (by_blocks(run)) {
            // Where a block is cut, all of it goes to the part that has its first element.
            first = (first + kBlock - 1) / kBlock * kBlock;
            last = std::min(run.numel, (last + kBlock - 1) / kBlock * kBlock);
            if (first >= last) return;
          }
          updates[size_t(index)](run, grads[index], *coefficients[index], first, last);
        });
  });
  return 0;
}

// Adds the squares of values[0, numel) to an exact sum of kSumWords words; 1 if the format is
// unknown.
EXPORT int64_t shardadam_sum_squares(const void* values, int64_t numel, int32_t grad_format,
                                     int64_t* words, int32_t threads) {
  const SumSquares sum = loops()->sum_squares(grad_format);
  if (!sum) return 1;
  const int64_t width = grad_format == kGradFloat64 ? 8 : grad_format == kGradFloat32 ? 4 : 2;
  const int32_t parts = parts_for(numel, threads);
  std::vector<int64_t> partial(size_t(parts) * kSumWords, 0);
  parallel(numel, parts, [&](int32_t part, int64_t begin, int64_t end) {
    sum(static_cast<const char*>(values) + begin * width, end - begin,
        partial.data() + int64_t(part) * kSumWords);
  });
  for (size_t i = 0; i < partial.size(); ++i) words[i % kSumWords] += partial[i];
  return 0;
}

// Writes the sum of `count` shards of `numel` elements, in order, to `out` (float; double for
// doubles), divided by `divisor` after: `count` for their mean. 1 if the format is unknown.
EXPORT int64_t shardadam_mean(const void* const* shards, int64_t count, int64_t divisor, void* out,
                              int64_t numel, int32_t grad_format, int32_t threads) {
  const Mean mean = loops()->mean(grad_format);
  if (!mean) return 1;
  parallel(numel, parts_for(numel, threads), [&](int32_t, int64_t begin, int64_t end) {
    mean(shards, count, divisor, out, begin, end);
  });
  return 0;
}

// The split master's codec over arrays (see adam_update.h).
EXPORT void shardadam_split(const float* master, uint16_t* param, int16_t* remainder, int64_t numel,
                            int32_t threads) {
  parallel(numel, parts_for(numel, threads), [&](int32_t, int64_t begin, int64_t end) {
    loops()->split(master + begin, param + begin, remainder + begin, end - begin);
  });
}

EXPORT void shardadam_join(const uint16_t* param, const int16_t* remainder, float* master,
                           int64_t numel, int32_t threads) {
  parallel(numel, parts_for(numel, threads), [&](int32_t, int64_t begin, int64_t end) {
    loops()->join(param + begin, remainder + begin, master + begin, end - begin);
  });
}
