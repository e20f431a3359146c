// coded_cuda.cu, every variant, behind an entry point for ctypes. Compiled with `-include shim.h`.
#include "coded_cuda.cu"
#include "variants.h"

using namespace shardadam;

namespace {

template <int kParam, int kState>
Update pick_rest(int grad, int flags) {
  return choose<kGradFloat32, kGradBf16, kGradFp16>(grad, [&](auto grad) {
    return choose_flags(flags, [](auto flags) -> Update {
      return update_batch_by_blocks<kParam, kState, decltype(grad)::value, decltype(flags)::value>;
    });
  });
}

Update pick(int param, int state, int grad, int flags) {
  if (state == kStateFull)
    return choose<kBf16Split8, kBf16Only>(param, [&](auto param) {
      return pick_rest<decltype(param)::value, kStateFull>(grad, flags);
    });
  return choose<kFloat32, kBf16Split, kBf16Master, kFp16Master, kBf16Split8, kBf16Only>(
      param, [&](auto param) {
        return choose<kStateBf16, kStateQ16, kStateQ8>(state, [&](auto state) {
          return pick_rest<decltype(param)::value, decltype(state)::value>(grad, flags);
        });
      });
}

}  // namespace

// Runs blocks [first, last) of a grid; 1 if there is no such variant.
extern "C" int update_blocks(int param, int state, int grad, int flags, const Batch* batch,
                             int64_t first, int64_t last, unsigned blocks, unsigned threads) {
  const Update kernel = pick(param, state, grad, flags);
  if (!kernel) return 1;
  shim::launch_together(first, last, blocks, threads, [&] { kernel(*batch); });
  return 0;
}
