#!/usr/bin/env bash
# Runs a study as a Slurm array, one task per line of shell commands; see docs/studies.md.
#   python -m studies.run studies/cifar10_ladder.toml --print > lines.txt
#   sbatch --array=1-$(wc -l < lines.txt)%8 script/slurm/study.sh lines.txt
# Tasks that run out of time save their run first: print the lines again and resubmit them.
#SBATCH --job-name=study
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120       # this shell gets SIGTERM 120 s before its time limit
#SBATCH --output=slurm-%A-%a.out
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the repository}"
line=$(sed -n "${SLURM_ARRAY_TASK_ID:?start this with sbatch --array}p" "${1:?name the file of lines}")

setsid bash -c "trap 'exit 75' TERM; $line" & # in its own process group
group=$!
trap 'kill -TERM -- "-$group"' TERM # training writes a checkpoint and ends
while
    wait "$group"
    code=$?
    kill -0 "$group" 2>/dev/null # a signal ended `wait` early
do :; done
exit "$code"
