// The .cu files themselves but for coded_cuda.cu, every variant, behind entry points for ctypes.
// Compiled with `-include shim.h`.
#include "adam_cuda.cu"
#include "coefficients_cuda.cu"
#include "norm_cuda.cu"
#include "variants.h"

using namespace shardadam;

namespace {

template <int kParam, int kGrad>
Update pick_flags(int flags) {
  return choose_flags(flags, [](auto flags) -> Update {
    return update_batch<kParam, kGrad, decltype(flags)::value>;
  });
}

Update pick(int param, int grad, int flags) {
  if (param == kFloat64)
    return grad == kGradFloat64 ? pick_flags<kFloat64, kGradFloat64>(flags) : nullptr;
  return choose<kFloat32, kBf16Split, kBf16Master, kFp16Master>(param, [&](auto param) {
    return choose<kGradFloat32, kGradBf16, kGradFp16>(grad, [&](auto grad) {
      return pick_flags<decltype(param)::value, decltype(grad)::value>(flags);
    });
  });
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
  shim::launch_together(0, blocks, blocks, kThreads, [&] { kernel(*pieces, words); });
  return 0;
}

extern "C" void root(const long long* words, double* result) { shardadam_root(words, result); }

extern "C" void advance(const Rows* rows, unsigned blocks, unsigned threads) {
  shim::launch(0, blocks, blocks, threads, [&] { shardadam_advance(*rows); });
}
