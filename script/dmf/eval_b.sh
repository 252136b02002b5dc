#!/usr/bin/env bash
# 50,000 samples of DMFT-B/2 at 256 for FID, in NUM_STEPS steps without guidance (it is trained in).
#   REF=VIRTUAL_imagenet256_labeled.npz NUM_STEPS=1 bash script/dmf/eval_b.sh [more flags of generate.py, e.g. --mode restart]
# Model flags that were given to the training script have to be given here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-dmft-b}
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/0400000.pt}
NUM_STEPS=${NUM_STEPS:-4}
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/fid-steps-$NUM_STEPS}
NUM_GPUS=${NUM_GPUS:-8}
RESULTS=${RESULTS:-results/steps-$NUM_STEPS}
source script/measure.sh # REF and INCEPTION_WEIGHTS from the environment

MODEL="DMFT-B/2"
DMF_DEPTH=8
SHIFT=1.0
NUM_FID_SAMPLES=50000
PER_PROC_BATCH_SIZE=64
MODE=euler

check_files
torchrun --standalone --nproc-per-node "$NUM_GPUS" generate.py \
    --ckpt "$CKPT" --sample-dir "$SAMPLE_DIR" --model "$MODEL" --dmf-depth "$DMF_DEPTH" --path-type linear \
    --num-fid-samples "$NUM_FID_SAMPLES" --per-proc-batch-size "$PER_PROC_BATCH_SIZE" \
    --mode "$MODE" --num-steps "$NUM_STEPS" --shift "$SHIFT" "$@"
measure_newest "$SAMPLE_DIR"
