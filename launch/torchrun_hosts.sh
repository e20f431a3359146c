#!/usr/bin/env bash
# Several hosts: the same command on each. They find each other through the head.
#
#   HEAD=10.0.0.1 HOSTS=2 launch/torchrun_hosts.sh train.py --lr 1e-3
#   HEAD=…  HOSTS=…         the address of one of the hosts; how many there are
#   RANKS=8 RESTARTS=3      ranks of a host; restarts of all ranks, on all hosts
#   INTERFACE=eth1          the network device, if not the one that leads to the head
set -euo pipefail
: "${HEAD:?the address of one of the hosts}" "${HOSTS:?how many hosts}"
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- examples/train_gpt.py --resume --skip-baseline

# This host's address and device on the way to the head; to itself the way is lo, which others
# can't reach: gloo takes it all the same where a host's name stands for 127.0.0.1, and hangs.
if ip -o -4 address | grep -qw "$HEAD"; then
  address=$HEAD is_head=1
  device=$(ip -o -4 address | awk -v head="$HEAD" '{ split($4, own, "/"); if (own[1] == head) print $2 }')
else
  is_head=0
  device=$(ip -o -4 route get "$HEAD" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  address=$(ip -o -4 route get "$HEAD" | sed -n 's/.* src \([^ ]*\).*/\1/p')
fi
export GLOO_SOCKET_IFNAME="${INTERFACE:-$device}" NCCL_SOCKET_IFNAME="${INTERFACE:-$device}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# As in torchrun.sh.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

exec torchrun --nnodes "$HOSTS" --nproc-per-node "${RANKS:-auto}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-conf "is_host=$is_head" \
  --rdzv-id "${JOB:-shardadam}" --local-addr "$address" \
  --max-restarts "${RESTARTS:-3}" "$@"
