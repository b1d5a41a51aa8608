#!/usr/bin/env bash
# A run on several nodes under Slurm, from the repository root: sbatch launch/slurm.sh configs/FILE.yaml [-o ...]
# Submit the same line again after a time limit or a failure: it goes on from the newest sealed checkpoint.
#SBATCH --job-name=mtkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
set -euo pipefail

# One task per node is one DeepSpeed launcher, which starts a process per slot.
# SIGTERM, five minutes before the limit, makes the ranks save a sealed checkpoint and end.
slots="${SLOTS:-${SLURM_GPUS_ON_NODE:-1}}"
port="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
hostfile=$(mktemp "$PWD/.hostfile-XXXXXX") # in the shared folder: every node reads it
trap 'rm -f "$hostfile"' EXIT
sed "s/$/ slots=$slots/" <<<"$hosts" >"$hostfile"

export PATH="$PWD/.venv/bin:$PATH" HOSTFILE="$hostfile" MASTER="${hosts%%$'\n'*}" MASTER_PORT="$port"
# shellcheck disable=SC2016  # expanded in each task, not here
srun --kill-on-bad-exit=1 bash -c '
  exec deepspeed -H "$HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER" --master_port "$MASTER_PORT" \
    --no_local_rank --module mtkd run "$@"' mtkd "$@"
