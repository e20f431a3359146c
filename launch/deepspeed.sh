#!/usr/bin/env bash
# DeepSpeed's launcher, for who has its hostfiles: it starts any script, not only DeepSpeed's.
#
#   launch/deepspeed.sh train.py --lr 1e-3
#   HOSTFILE=hosts launch/deepspeed.sh train.py      lines of "host slots=8"; needs ssh and pdsh
#
# It restarts nothing: start it again, and the run goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${RANK:-}" ]; then # on the host that starts all
  [ $# -gt 0 ] || set -- examples/train_gpt.py --resume --skip-baseline
  ranks=(--num_gpus "${RANKS:-2}")
  [ -z "${HOSTFILE:-}" ] || ranks=(--hostfile "$HOSTFILE")
  ranks+=(--master_port "${PORT:-29400}")
  # Without --no_local_rank every script would have to take that argument. A shell that ssh opens
  # has another PATH, so which python is said.
  exec deepspeed "${ranks[@]}" --no_local_rank --no_python "$PWD/launch/deepspeed.sh" \
    "$(command -v python)" "$@"
fi
# Here is a rank, in which little of the environment is left. The device is the one that leads to the
# first host, as in torchrun_hosts.sh.
device=$(ip -o -4 address | awk -v head="$MASTER_ADDR" '{ split($4, own, "/"); if (own[1] == head) print $2 }')
[ -n "$device" ] || device=$(ip -o -4 route get "$MASTER_ADDR" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
export GLOO_SOCKET_IFNAME="${INTERFACE:-$device}" NCCL_SOCKET_IFNAME="${INTERFACE:-$device}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$@"
