#!/usr/bin/env bash
# One host: a rank per GPU, or per CPU core. When a rank fails, all are started again.
#
#   launch/torchrun.sh                              the demo
#   launch/torchrun.sh train.py --lr 1e-3           a script, and its arguments
#   RANKS=4 RESTARTS=0 launch/torchrun.sh …         how many ranks; how many restarts
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- examples/train_gpt.py --resume --skip-baseline

# Ranks share the cores: more threads than cores make all of them slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun's store outlives a restart, and ranks would look for the addresses of dead ones: most
# restarts over gloo fail. With this each attempt has a store of its own; elastic.init_process_group
# does not need it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that ranks have for saving after SIGTERM: torchrun gives them 30, then kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

exec torchrun --standalone --nproc-per-node "${RANKS:-auto}" --max-restarts "${RESTARTS:-3}" "$@"
