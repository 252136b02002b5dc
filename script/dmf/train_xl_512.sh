#!/usr/bin/env bash
# DMFT-XL/2 on ImageNet 512 with the published settings: 800,000 steps, QK norm; published FID 2.12 in 1 step, 1.68 in 4.
#   bash script/dmf/train_xl_512.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
# CKPT is the flow model to start from: a checkpoint of ours, or a published SiT, REPA or Decoupled MeanFlow file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

CKPT=${CKPT:?set CKPT to the flow model to start from}
DATA_DIR=${DATA_DIR:-data/imagenet512}   # holds images/ and vae-sd/, or packed shards
OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-dmft-xl-512}
NUM_GPUS=${NUM_GPUS:-8}
MIXED_PRECISION=${MIXED_PRECISION:-bf16}

MODEL="DMFT-XL/2"
DMF_DEPTH=20
OMEGA=0.6
G_MIN=0.0
G_MAX=0.8
BATCH_SIZE=256                           # global
MAX_TRAIN_STEPS=800000
CHECKPOINTING_STEPS=100000

# Both signals reach every process, which then saves and stops; see docs/cluster.md.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --standalone --nproc-per-node "$NUM_GPUS" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train_dmf.py \
    --exp-name "$EXP_NAME" --output-dir "$OUTPUT_DIR" --data-dir "$DATA_DIR" --resume auto \
    --model "$MODEL" --pretrained "$CKPT" --dmf-depth "$DMF_DEPTH" --attn-func auto --qk-norm \
    --g-type mg --omega "$OMEGA" --g-min "$G_MIN" --g-max "$G_MAX" \
    --P-mean 0.0 --P-std 1.0 --P-mean-t 0.4 --P-std-t 1.0 --P-mean-r -1.2 --P-std-r 1.0 \
    --path-type linear --cfg-prob 0.1 --batch-size "$BATCH_SIZE" --learning-rate 1e-4 --adam-beta1 0.9 --adam-beta2 0.95 \
    --max-grad-norm 1.0 --ema-decay 0.9999 --mixed-precision "$MIXED_PRECISION" --max-train-steps "$MAX_TRAIN_STEPS" \
    --checkpointing-steps "$CHECKPOINTING_STEPS" --seed 0 "$@"
