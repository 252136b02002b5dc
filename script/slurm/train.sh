#!/usr/bin/env bash
# DeepFlow-XL/2-3T on two nodes of eight GPUs under Slurm, requeued until it is done; docs/cluster.md explains it.
#   sbatch script/slurm/train.sh [more flags of train.py]
# The repository, DATA_DIR (data/imagenet256) and OUTPUT_DIR (exps) must be on a file system that all nodes share.
#SBATCH --job-name=deepflow-xl-3t
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8       # one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # 300 s before the end of its time this shell gets SIGUSR1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the repository}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # since Slurm 22.05, srun no longer takes --cpus-per-task from sbatch

# No launcher in between: srun starts every process, passes on the signals it gets, and waits as long as it takes.
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train.py "$@"' train.py \
    ${EXP_NAME:+--exp-name "$EXP_NAME"} --output-dir "${OUTPUT_DIR:-exps}" --data-dir "${DATA_DIR:-data/imagenet256}" \
    ${MIXED_PRECISION:+--mixed-precision "$MIXED_PRECISION"} \
    --resume auto --model DeepFlow-XL/2 --max-train-steps 2000000 --compile "$@" \
    ${SLURM_RESTART_COUNT:+--resume auto} & # --resume STEP rewinds once, not after every requeue
step=$!
out_of_time=no
trap 'out_of_time=yes; kill -USR1 "$step"' USR1
trap 'kill -TERM "$step"' TERM
while
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null # a signal ended `wait` early
do :; done
if [ "$out_of_time" = yes ] && [ "$code" -ne 0 ]; then
    echo "stopped at the time limit with code $code; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
