#!/bin/bash
#SBATCH --job-name=k2
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@600
# Where each task is comes from Slurm's variables. Ten minutes before the time limit, and on preemption, Slurm sends
# SIGTERM to the tasks; the run saves and ends, and the job goes back into the queue until it has finished.
workdir=${1:?usage: sbatch launch/slurm.sh WORKDIR [ARGUMENTS OF kimi_jax.train]}
shift
srun --kill-on-bad-exit=1 launch/until_finished.sh "$workdir" "$@"
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
