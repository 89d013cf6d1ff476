#!/usr/bin/env bash
# Test on the GPUs of one machine or of several:
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS_PER_MACHINE [arguments of test.py]
#
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and
# PORT set.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 CONFIG CHECKPOINT GPUS_PER_MACHINE" \
    "[arguments of test.py]" >&2
  exit 2
fi
config=$1
checkpoint=$2
gpus=$3
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  echo "$0: GPUS_PER_MACHINE must be a whole number from 1 on, got '$gpus'" >&2
  exit 2
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$gpus" \
  "$(dirname "$0")/test.py" "$config" "$checkpoint" \
  --launcher pytorch "${@:4}"
