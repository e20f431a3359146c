// Variants of a kernel, picked by numbers that are known at run time.
#pragma once

#include <type_traits>

#include "batch_cuda.h"

using Update = void (*)(const shardadam::Batch&);

// What `use` gives for the one of kCodes that `code` is, as a constant; null for another.
template <int... kCodes, class Use>
Update choose(int code, Use use) {
  Update found = nullptr;
  ((code == kCodes && (found = use(std::integral_constant<int, kCodes>()))) || ...);
  return found;
}

template <class Use>
Update choose_flags(int flags, Use use) {
  return choose<0, 1, 2, 4, 5, 6>(flags, use);
}
