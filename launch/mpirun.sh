#!/usr/bin/env bash
# MPI starts the ranks, and gloo or NCCL connects them: no MPI in torch is needed.
#
#   RANKS=8 HOSTFILE=hosts launch/mpirun.sh train.py --lr 1e-3     lines of "host slots=8"
#
# It restarts nothing: start it again, and the run goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- examples/train_gpt.py --resume --skip-baseline

if [ -z "${OMPI_COMM_WORLD_RANK:-}" ]; then # on the host that starts all
  hosts=()
  [ -z "${HOSTFILE:-}" ] || hosts=(--hostfile "$HOSTFILE")
  MASTER_ADDR="${MASTER_ADDR:-$(hostname -I | awk '{ print $1 }')}"
  MASTER_PORT="${PORT:-29400}"
  export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  exec mpirun -np "${RANKS:-2}" "${hosts[@]}" --bind-to none \
    -x MASTER_ADDR -x MASTER_PORT -x OMP_NUM_THREADS -x PATH \
    "$PWD/launch/mpirun.sh" "$@"
fi
# Here is a rank. The device is the one that leads to the first host, as in torchrun_hosts.sh.
device=$(ip -o -4 address | awk -v head="$MASTER_ADDR" '{ split($4, own, "/"); if (own[1] == head) print $2 }')
[ -n "$device" ] || device=$(ip -o -4 route get "$MASTER_ADDR" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
export GLOO_SOCKET_IFNAME="${INTERFACE:-$device}" NCCL_SOCKET_IFNAME="${INTERFACE:-$device}"
# Open MPI's names for what torch reads.
export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
export LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE
exec python "$@"
