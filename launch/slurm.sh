#!/usr/bin/env bash
# A run on several nodes under Slurm, from the repository root: sbatch launch/slurm.sh configs/FILE.yaml [-o ...]
# Two minutes before the time limit the ranks save and end, and the job queues itself again. After a failure, submit the
# same line again: it goes on from the newest sealed checkpoint.
#SBATCH --job-name=mtkd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

# mtkd starts one task per node with srun, and that one a process per GPU.
processes="${SLURM_GPUS_ON_NODE:-1}"
export PATH="$PWD/.venv/bin:$PATH"
code=0
mtkd run -o engine.kind=deepspeed -o engine.launcher=slurm -o engine.processes="$processes" "$@" || code=$?
if [ "$code" = 75 ]; then # stopped by a signal, and saved
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
