// The .cu files themselves, every variant, behind entry points for ctypes. Compiled with
// `-include shim.h`.
#include "adam_cuda.cu"
#include "coefficients_cuda.cu"
#include "norm_cuda.cu"

using namespace shardadam;

namespace {

using Update = void (*)(const Batch&);

template <int kParam, int kGrad>
Update pick_flags(int flags) {
  switch (flags) {
    case 0: return update_batch<kParam, kGrad, 0>;
    case 1: return update_batch<kParam, kGrad, 1>;
    case 2: return update_batch<kParam, kGrad, 2>;
    case 4: return update_batch<kParam, kGrad, 4>;
    case 5: return update_batch<kParam, kGrad, 5>;
    case 6: return update_batch<kParam, kGrad, 6>;
    default: return nullptr;
  }
}

template <int kParam>
Update pick_grad(int grad, int flags) {
  switch (grad) {
    case kGradFloat32: return pick_flags<kParam, kGradFloat32>(flags);
    case kGradBf16: return pick_flags<kParam, kGradBf16>(flags);
    case kGradFp16: return pick_flags<kParam, kGradFp16>(flags);
    default: return nullptr;
  }
}

Update pick(int param, int grad, int flags) {
  switch (param) {
    case kFloat32: return pick_grad<kFloat32>(grad, flags);
    case kFloat64: return pick_flags<kFloat64, kGradFloat64>(flags);
    case kBf16Split: return pick_grad<kBf16Split>(grad, flags);
    case kBf16Master: return pick_grad<kBf16Master>(grad, flags);
    case kFp16Master: return pick_grad<kFp16Master>(grad, flags);
    default: return nullptr;
  }
}

}  // namespace

// Runs blocks [first, last) of a grid; 1 if there is no such variant.
extern "C" int update(int param, int grad, int flags, const Batch* batch, int64_t first,
                      int64_t last, unsigned blocks, unsigned threads) {
  const Update kernel = pick(param, grad, flags);
  if (!kernel) return 1;
  shim::launch(first, last, blocks, threads, [&] { kernel(*batch); });
  return 0;
}

extern "C" int sum(int grad, const Pieces* pieces, unsigned long long* words, unsigned blocks) {
  const auto kernel = grad == kGradFloat32   ? sum_squares<kGradFloat32>
                      : grad == kGradFloat64 ? sum_squares<kGradFloat64>
                      : grad == kGradBf16    ? sum_squares<kGradBf16>
                                             : sum_squares<kGradFp16>;
  shim::launch_together(blocks, kThreads, [&] { kernel(*pieces, words); });
  return 0;
}

extern "C" void root(const long long* words, double* result) { shardadam_root(words, result); }

extern "C" void advance(const Rows* rows, unsigned blocks, unsigned threads) {
  shim::launch(0, blocks, blocks, threads, [&] { shardadam_advance(*rows); });
}
