#!/usr/bin/env bash
# DMFT-XL/2 on ImageNet 512 with the published settings: 800,000 steps, QK norm; published FID 2.12 in 1 step, 1.68 in 4.
#   CKPT=FILE bash script/dmf/train_xl_512.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
DATA_DIR=${DATA_DIR:-data/imagenet512}
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train_map --model DMFT-XL/2 --resolution 512 --qk-norm --g-max 0.8 \
    --max-train-steps 800000 --checkpointing-steps 100000 "$@"
