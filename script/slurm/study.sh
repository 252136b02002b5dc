#!/usr/bin/env bash
# A study as a Slurm array, a task for each line of shell commands; docs/studies.md explains it.
#   python -m studies.run studies/cifar10_ladder.toml --print > lines.txt
#   sbatch --array=1-$(wc -l < lines.txt)%8 script/slurm/study.sh lines.txt
# Tasks that ran out of time have saved their run: print the lines anew and submit them.
#SBATCH --job-name=study
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120       # 120 s before the end of its time this shell gets SIGTERM
#SBATCH --output=slurm-%A-%a.out
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the repository}"
line=$(sed -n "${SLURM_ARRAY_TASK_ID:?start this with sbatch --array}p" "${1:?name the file of lines}")

setsid bash -c "trap 'exit 75' TERM; $line" & # a process group of its own
group=$!
trap 'kill -TERM -- "-$group"' TERM # training writes a checkpoint and ends
code=0
wait "$group" || code=$?
while kill -0 "$group" 2>/dev/null; do # a signal ends `wait` early
    code=0
    wait "$group" || code=$?
done
exit "$code"
