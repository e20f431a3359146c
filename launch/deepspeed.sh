#!/usr/bin/env bash
# DeepSpeed's launcher, for who has its hostfiles: it sets what torch reads, and starts any script.
#
#   launch/deepspeed.sh train.py --lr 1e-3
#   HOSTFILE=hosts launch/deepspeed.sh train.py      lines of "host slots=8", with ssh between them
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- examples/train_gpt.py --resume --skip-baseline
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${HOSTFILE:-}" ]; then
  exec deepspeed --hostfile "$HOSTFILE" "$@"
fi
exec deepspeed --num_gpus "${RANKS:-2}" "$@"
