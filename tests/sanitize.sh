#!/usr/bin/env bash
# Builds the compiled twin with sanitizers and runs what tests it, see docs/numerics.md. Whatever
# they report ends it. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
cxx=${CXX:-c++}
memory=address,undefined

# build FOLDER SANITIZERS: the twin, and tests/twin_alone.cpp beside it.
build() {
  echo "==> building the CPU kernel with $2"
  "$python" -m pip -qq --disable-pip-version-check install . --no-deps --upgrade \
    --target "build/$1" -C build-dir="build/$1/cmake" -C cmake.define.SHARDADAM_SANITIZE="$2"
  "$cxx" -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize="$2" -fno-sanitize-recover=all \
    -I shardadam/csrc tests/twin_alone.cpp "build/$1/shardadam/kernels/libshardadam_cpu.so" \
    -Wl,-rpath,"\$ORIGIN/shardadam/kernels" -o "build/$1/twin_alone"
}

export TSAN_OPTIONS=halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
build sanitize_threads thread
build/sanitize_threads/twin_alone threads

build sanitize_memory "$memory"
build/sanitize_memory/twin_alone bounds

# Python keeps memory until it ends, so leaks are not looked for. libasan has to come first in a
# process, and needs the C++ runtime beside it to see what torch throws. Left out: all 2^32 patterns,
# which would take hours, and two tests of memory, of which ASan reserves and keeps some.
echo "==> testing it, and the CUDA kernels compiled for the CPU"
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 CXXFLAGS="-fsanitize=$memory -fno-sanitize-recover=all" \
  "$python" -m pytest --twin build/sanitize_memory/shardadam/kernels/libshardadam_cpu.so \
  -o timeout=900 -k "not all_patterns and not does_not_fit_into_memory and not no_memory_that_grows" \
  tests/test_{twin,coded_twin,exact_sum,formats,split_master,stochastic_masters}.py \
  tests/test_{low_memory,offload,cuda_on_cpu}.py "$@"
