#!/usr/bin/env bash
# DeepFlow-B/2-2T on ImageNet 256: 400,000 steps (80 epochs), the paper's FID 23.1.
#   bash script/base/train.sh [more flags of train.py, e.g. --tg-upper-bound 0.05]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_DIR=${DATA_DIR:-data/imagenet256}   # holds images/ and vae-sd/, or packed shards
OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-deepflow-b-2t}
NUM_GPUS=${NUM_GPUS:-8}
MIXED_PRECISION=${MIXED_PRECISION:-bf16} # the published runs used fp16

MODEL="DeepFlow-B/2"
TRANS_DEPTH=12
DF_IDXS="[6]"
SCALE_WEIGHT="0.2 1.0"
TG_UPPER_BOUND=0.01
WEIGHTING=lognormal
ACC_COEFF=1.0
LEGACY_SCALING=--no-legacy-scaling        # --legacy-scaling as in the SSL-aligned release
BATCH_SIZE=256                            # global
MAX_TRAIN_STEPS=400000
CHECKPOINTING_STEPS=100000

# Both signals reach every process, which then saves and stops; see docs/cluster.md.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# shellcheck disable=SC2086  # SCALE_WEIGHT is a list
exec torchrun --standalone --nproc-per-node "$NUM_GPUS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py \
    --exp-name "$EXP_NAME" --output-dir "$OUTPUT_DIR" --data-dir "$DATA_DIR" --resume auto \
    --model "$MODEL" --trans-depth "$TRANS_DEPTH" --df-idxs "$DF_IDXS" --scale-weight $SCALE_WEIGHT \
    --tg-upper-bound "$TG_UPPER_BOUND" --weighting "$WEIGHTING" --acc-coeff "$ACC_COEFF" "$LEGACY_SCALING" \
    --path-type linear --cfg-prob 0.1 --batch-size "$BATCH_SIZE" --learning-rate 1e-4 --ema-decay 0.9999 \
    --mixed-precision "$MIXED_PRECISION" --max-train-steps "$MAX_TRAIN_STEPS" \
    --checkpointing-steps "$CHECKPOINTING_STEPS" --seed 0 "$@"
