#!/usr/bin/env bash
# Train under slurm, torch's own launcher on every node:
#
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] [PORT=...] \
#     tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
  exit 2
fi
partition=$1
job_name=$2
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
cpus_per_task=${CPUS_PER_TASK:-5}
for name in gpus gpus_per_node cpus_per_task; do
  if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "$0: ${name^^} must be a whole number from 1 on, got '${!name}'" >&2
    exit 2
  fi
done
if ((gpus < gpus_per_node)); then
  gpus_per_node=$gpus
fi
if ((gpus % gpus_per_node)); then
  echo "GPUS=$gpus is no multiple of GPUS_PER_NODE=$gpus_per_node" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)

# One task a node; torch starts a process for each of its GPUs.
# shellcheck disable=SC2016,SC2086
exec srun --partition="$partition" --job-name="$job_name" \
  --gres="gpu:$gpus_per_node" --nodes=$((gpus / gpus_per_node)) \
  --ntasks-per-node=1 \
  --cpus-per-task=$((cpus_per_task * gpus_per_node)) \
  --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  bash -c '
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    gpus=$1 port=$2 script=$3
    exec "${PYTHON:-python}" -m torch.distributed.run \
      --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" \
      --master_addr="$first" --master_port="$port" \
      --nproc_per_node="$gpus" "$script" --launcher pytorch "${@:4}"
  ' slurm_train "$gpus_per_node" "${PORT:-29500}" "$here/train.py" "${@:3}"
