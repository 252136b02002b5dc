#!/usr/bin/env bash
# Text-to-image DeepFlow-3T on MS-COCO 256, 24 layers: 150,000 steps, the paper's FID 5.32 (with SSL=1 4.18).
#   bash script/t2i/train.sh [more flags of train_t2i.py]
# The baseline: MODEL=MMDiT-L/2 EXP_NAME=mmdit bash script/t2i/train.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DATA_DIR=${DATA_DIR:-data/coco256/train}   # holds vae-sd/ and text/ (images/ with SSL=1), or U-ViT's files
OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-deepflow-t2i-3t}
NUM_GPUS=${NUM_GPUS:-8}
MIXED_PRECISION=${MIXED_PRECISION:-bf16}   # the published runs used fp16
MODEL=${MODEL:-DeepFlow-MMDiT-L/2}
SSL=${SSL:-0}

TG_UPPER_BOUND=0.01
WEIGHTING=uniform
ACC_COEFF=1.0
BATCH_SIZE=256                             # global
MAX_TRAIN_STEPS=150000
CHECKPOINTING_STEPS=50000

align=()
[ "$SSL" = 1 ] && align=(--ssl-align --enc-type dinov2-vit-b --proj-coeff 0.5)
[[ $SSL = 1 && $MODEL = DeepFlow-* ]] && align+=(--legacy-scaling)
# Both signals reach every process, which then saves and stops; see docs/cluster.md.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --standalone --nproc-per-node "$NUM_GPUS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train_t2i.py \
    --exp-name "$EXP_NAME" --output-dir "$OUTPUT_DIR" --data-dir "$DATA_DIR" --resume auto --model "$MODEL" \
    --tg-upper-bound "$TG_UPPER_BOUND" --weighting "$WEIGHTING" --acc-coeff "$ACC_COEFF" \
    --path-type linear --cfg-prob 0.1 --batch-size "$BATCH_SIZE" --learning-rate 1e-4 --ema-decay 0.9999 \
    --mixed-precision "$MIXED_PRECISION" --max-train-steps "$MAX_TRAIN_STEPS" \
    --checkpointing-steps "$CHECKPOINTING_STEPS" --seed 0 ${align[@]+"${align[@]}"} "$@"
