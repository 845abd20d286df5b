#!/usr/bin/env bash
# One training (or evaluation) over several SLURM nodes; every node starts its own processes, no ssh between them.
#
#   sbatch --nodes=2 docs/slurm.sh train --run-dir runs/mine model.path=/models/llama data.path=/data/rows.jsonl train.global_batch=128
#
# From the checkout, which all nodes must see, as they must see the run folder. A stop before the time limit saves a
# checkpoint and puts the job back into the queue, where the same command continues.
#SBATCH --job-name=loradrop
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
code=0
srun --kill-on-bad-exit=0 bash launch.sh "$@" \
    launch.nodes="$SLURM_JOB_NUM_NODES" \
    launch.processes="${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
    launch.master_addr="${MASTER_ADDR:-$first}" \
    launch.master_port="$((20000 + SLURM_JOB_ID % 10000))" || code=$?
if [ "$code" -eq 75 ]; then # stopped on request: everything is saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
