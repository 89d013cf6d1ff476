#!/usr/bin/env bash
# Train on the GPUs of one machine or of several:
#
#   tools/dist_train.sh CONFIG GPUS_PER_MACHINE [arguments of train.py]
#
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and
# PORT set.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG GPUS_PER_MACHINE [arguments of train.py]" >&2
  exit 2
fi
config=$1
gpus=$2
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
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "${@:3}"
