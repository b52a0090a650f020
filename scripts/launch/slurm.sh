#!/usr/bin/env bash
# jaxprompt under Slurm: one process a GPU, on as many nodes as are asked for.
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 scripts/launch/slurm.sh CONFIG [key=value ...]
#
# Run it from the repository, in a directory that all nodes share. Two minutes before the time limit
# and at a preemption Slurm sends SIGTERM: the run saves, exits with 0, and is put back into the queue
# until it is complete. To stop it for good: scancel.
#SBATCH --job-name=jaxprompt
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: sbatch [options] scripts/launch/slurm.sh CONFIG [key=value ...]" >&2; exit 2; }

# if one process dies, the others are ended too: what is left would only wait for it
status=0
srun --kill-on-bad-exit=1 .venv/bin/jaxprompt train "$@" >"slurm-${SLURM_JOB_ID}.json" || status=$?
[ "$status" -eq 0 ] || exit "$status"
# a complete run prints its result; one that was interrupted prints nothing
if [ ! -s "slurm-${SLURM_JOB_ID}.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
