#!/usr/bin/env bash
# FID as the paper measures it: 50,000 samples, SDE, 250 steps, no guidance, then ADM's suite against REF.
#   REF=VIRTUAL_imagenet256_labeled.npz bash script/base/eval.sh [more flags of generate.py]
# With guidance: --cfg-scale 1.3 --guidance-high 0.7.
# Model flags that were given to train.sh have to be given here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-deepflow-b-2t}
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/0400000.pt}
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/fid}
NUM_GPUS=${NUM_GPUS:-8}
source script/measure.sh # REF, INCEPTION_WEIGHTS and RESULTS from the environment

MODEL="DeepFlow-B/2"
TRANS_DEPTH=12
DF_IDXS="[6]"
NUM_FID_SAMPLES=50000
PER_PROC_BATCH_SIZE=64
MODE=sde
NUM_STEPS=250
CFG_SCALE=1.0

check_files
torchrun --standalone --nproc-per-node "$NUM_GPUS" generate.py \
    --ckpt "$CKPT" --sample-dir "$SAMPLE_DIR" \
    --model "$MODEL" --trans-depth "$TRANS_DEPTH" --df-idxs "$DF_IDXS" --path-type linear \
    --num-fid-samples "$NUM_FID_SAMPLES" --per-proc-batch-size "$PER_PROC_BATCH_SIZE" \
    --mode "$MODE" --num-steps "$NUM_STEPS" --cfg-scale "$CFG_SCALE" "$@"
measure_newest "$SAMPLE_DIR"
