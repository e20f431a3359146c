// The compiled twin without Python, for sanitizers (`make sanitize`): every format in buffers that
// end where the elements end, and its threads: those of one call, those of an OpenMP that was
// handed over, and callers that update at the same time, as the slots of offloaded state do.
//
// However the work is cut, the bits are those of one thread; a difference is exit code 1.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "twin.h"

using namespace shardadam;

namespace {

using Bytes = std::vector<unsigned char>;

constexpr int kThreads = 4;
constexpr int64_t kForAllThreads = kThreads * (int64_t(1) << 16) + 300;
constexpr int kParamBytes[] = {4, 8, 2, 2, 2, 2, 2};
constexpr int kMasterBytes[] = {0, 0, 2, 4, 4, 1, 0};
constexpr int kGradBytes[] = {4, 8, 2, 2};
constexpr int kAverageBytes[] = {4, 2, 1, 1};
constexpr int kSquareBytes[] = {4, 2, 2, 1};
constexpr int32_t kFlags[] = {0,       kFlagAmsgrad,           kFlagNesterov,
                              kFlagL2, kFlagL2 | kFlagAmsgrad, kFlagL2 | kFlagNesterov};

void demand(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what.c_str());
  std::exit(1);
}

// Finite numbers of every format: with its bits under the mask, no byte ends an exponent of ones.
constexpr unsigned kFinite = 0xbb, kNotNegative = 0x3b;

Bytes noise(int64_t bytes, uint32 seed, unsigned mask = kFinite) {
  Bytes made(size_t(bytes), 0);
  for (unsigned char& byte : made) {
    seed = seed * 1664525u + 1013904223u;
    byte = static_cast<unsigned char>((seed >> 24) & mask);
  }
  return made;
}

// All that an update of `numel` elements reads and writes, and nothing around it.
struct Problem {
  int32_t state, param, grad, flags;
  int64_t numel;
  Bytes params, master, average, square, maximum, scales[3], grads;

  Problem(int32_t state, int32_t param, int32_t grad, int32_t flags, int64_t numel)
      : state(state), param(param), grad(grad), flags(flags), numel(numel) {
    const int wider = param == kFloat64 ? 2 : 1;
    const int64_t blocks = state >= kStateQ16 ? (numel + kBlock - 1) / kBlock : 0;
    const unsigned moments = state < kStateQ16 ? kNotNegative : 0xff;  // any code is one
    params = noise(numel * kParamBytes[param], 1);
    master = noise(numel * kMasterBytes[param], 2);
    average = noise(numel * kAverageBytes[state] * wider, 3);
    square = noise(numel * kSquareBytes[state] * wider, 4, moments);
    if (amsgrad()) maximum = noise(numel * kSquareBytes[state] * wider, 5, moments);
    // As an update leaves them: neither negative nor less than the root of the least float.
    for (int i = 0; i < (amsgrad() ? 3 : 2); ++i) scales[i] = Bytes(size_t(blocks) * 2, 0x3c);
    grads = noise(numel * kGradBytes[grad], 9);
  }

  bool amsgrad() const { return flags & kFlagAmsgrad; }

  bool operator==(const Problem& other) const {
    return params == other.params && master == other.master && average == other.average &&
           square == other.square && maximum == other.maximum && scales[0] == other.scales[0] &&
           scales[1] == other.scales[1] && scales[2] == other.scales[2];
  }

  Coefficients coefficients() const {
    return {0.9,
            0.999,
            0.1,
            1e-3,
            flags & kFlagNesterov ? 0.01 : 0,
            1e-2,
            1e-8,
            0.999,
            flags & kFlagL2 ? 0.1 : 0,
            1,
            3};
  }

  // Elements from `begin`, a multiple of kBlock, to `end`.
  Run window(int64_t begin, int64_t end) {
    const auto at = [&](Bytes& bytes, int64_t each) {
      return bytes.empty() ? nullptr : static_cast<void*>(bytes.data() + begin * each);
    };
    const auto scale = [&](int i) {
      return scales[i].empty() ? nullptr
                               : reinterpret_cast<uint16*>(scales[i].data()) + begin / kBlock;
    };
    const int wider = param == kFloat64 ? 2 : 1;
    return {at(params, kParamBytes[param]),
            at(master, kMasterBytes[param]),
            at(average, kAverageBytes[state] * wider),
            at(square, kSquareBytes[state] * wider),
            at(maximum, kSquareBytes[state] * wider),
            scale(0),
            scale(1),
            scale(2),
            end - begin,
            begin / kBlock,
            7,
            param,
            state,
            grad};
  }

  // Returns what shardadam_update returns.
  int64_t update(int64_t begin, int64_t end, int32_t threads) {
    const Run run = window(begin, end);
    const Coefficients c = coefficients();
    const Run* runs[] = {&run};
    const Coefficients* all[] = {&c};
    const void* gradients[] = {grads.data() + begin * kGradBytes[grad]};
    return shardadam_update(runs, gradients, all, 1, threads);
  }

  std::string name() const {
    return "state " + std::to_string(state) + ", param " + std::to_string(param) + ", grad " +
           std::to_string(grad) + ", flags " + std::to_string(flags) + ", " +
           std::to_string(numel) + " elements";
  }
};

// Calls visit(state, param, grad) for all that there are kernels for.
int for_every_format(const std::function<void(int32_t, int32_t, int32_t)>& visit) {
  int count = 0;
  for (int32_t state = kStateFull; state <= kStateQ8; ++state)
    for (int32_t param = kFloat32; param <= kBf16Only; ++param)
      for (int32_t grad = kGradFloat32; grad <= kGradFp16; ++grad)
        if (!Problem(state, param, grad, 0, 1).update(0, 1, 1)) {
          visit(state, param, grad);
          ++count;
        }
  return count;
}

int bounds() {
  const int formats = for_every_format([](int32_t state, int32_t param, int32_t grad) {
    for (int32_t flags : kFlags)
      for (int64_t numel : {1, 3, 15, 16, 17, 63, 65, 127, 128, 129, 255, 257, 700})
        Problem(state, param, grad, flags, numel).update(0, numel, 1);
  });
  for (int32_t grad = kGradFloat32; grad <= kGradFp16; ++grad)
    for (int64_t numel = 1; numel < 700; numel += 1 + numel / 9) {
      const Bytes first = noise(numel * kGradBytes[grad], 1), other = first;
      Bytes mean(size_t(numel) * (grad == kGradFloat64 ? 8 : 4));
      const void* shards[] = {first.data(), other.data()};
      demand(!shardadam_mean(shards, 2, 2, mean.data(), numel, grad, 1), "mean");
      std::vector<int64_t> words(kSumWords);
      demand(!shardadam_sum_squares(first.data(), numel, grad, words.data(), 1), "sum");
    }
  return formats;
}

// One call's threads, in a few formats, and all the other entry points'.
void threads_of_a_call() {
  for_every_format([](int32_t state, int32_t param, int32_t grad) {
    Problem alone(state, param, grad, state == kStateFull ? kFlagL2 : kFlagAmsgrad, kForAllThreads);
    Problem threaded = alone;
    alone.update(0, alone.numel, 1);
    threaded.update(0, threaded.numel, kThreads);
    demand(alone == threaded, alone.name());
  });
  const Bytes grads = noise(kForAllThreads * 4, 1);
  std::vector<int64_t> alone(kSumWords), threaded(kSumWords);
  shardadam_sum_squares(grads.data(), kForAllThreads, kGradFloat32, alone.data(), 1);
  shardadam_sum_squares(grads.data(), kForAllThreads, kGradFloat32, threaded.data(), kThreads);
  demand(alone == threaded, "sum of squares");
  std::vector<float> master(kForAllThreads), joined(kForAllThreads), mean(kForAllThreads);
  std::memcpy(master.data(), grads.data(), grads.size());
  std::vector<uint16_t> param(kForAllThreads);
  std::vector<int16_t> remainder(kForAllThreads);
  shardadam_split(master.data(), param.data(), remainder.data(), kForAllThreads, kThreads);
  shardadam_join(param.data(), remainder.data(), joined.data(), kForAllThreads, kThreads);
  demand(master == joined, "split and join");
  const void* shards[] = {master.data(), joined.data()};
  shardadam_mean(shards, 2, 2, mean.data(), kForAllThreads, kGradFloat32, kThreads);
  demand(mean == master, "mean of equals");
}

// Callers that update neighbouring windows of one shard, two rounds of them, and measure gradients.
void callers_at_once() {
  constexpr int64_t kWindow = 40 * kBlock;
  for_every_format([](int32_t state, int32_t param, int32_t grad) {
    Problem alone(state, param, grad, kFlagAmsgrad, 2 * kThreads * kWindow - 5);
    Problem shared = alone;
    alone.update(0, alone.numel, 1);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kThreads; ++caller)
      callers.emplace_back([&, caller] {
        for (int64_t window : {caller, caller + kThreads}) {
          const int64_t begin = window * kWindow;
          const int64_t end = std::min(begin + kWindow, shared.numel);
          shared.update(begin, end, 1);
          std::vector<int64_t> words(kSumWords);
          shardadam_sum_squares(shared.grads.data(), shared.numel, grad, words.data(), 1);
        }
      });
    for (std::thread& caller : callers) caller.join();
    demand(alone == shared, "callers at once, " + alone.name());
  });
}

// An OpenMP of our own, that gives one thread less than was asked for.
thread_local int pool_thread = 0, pool_size = 1;

void pool_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int given = int(threads) > 1 ? int(threads) - 1 : 1;
  std::vector<std::thread> pool;
  for (int i = 0; i < given; ++i)
    pool.emplace_back([=] {
      pool_thread = i;
      pool_size = given;
      body(data);
    });
  for (std::thread& thread : pool) thread.join();
}
int pool_thread_num() { return pool_thread; }
int pool_num_threads() { return pool_size; }

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count == 2 ? arguments[1] : "";
  if (what != "bounds" && what != "threads") {
    std::fprintf(stderr, "usage: twin_alone bounds | threads\n");
    return 2;
  }
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (shardadam_use_isa(isa)) {
      std::printf("%s: not on this processor, or not built\n", isa);
    } else if (what == "bounds") {
      std::printf("%s: %d formats in buffers of their size\n", isa, bounds());
    } else {
      shardadam_use_openmp(nullptr, nullptr, nullptr);
      threads_of_a_call();
      callers_at_once();
      shardadam_use_openmp(reinterpret_cast<void*>(pool_parallel),
                           reinterpret_cast<void*>(pool_thread_num),
                           reinterpret_cast<void*>(pool_num_threads));
      threads_of_a_call();
      std::printf("%s: %d threads, an OpenMP's, and callers at once give the bits of one\n", isa,
                  kThreads);
    }
  }
}
