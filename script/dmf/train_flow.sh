#!/usr/bin/env bash
# The flow model that Decoupled MeanFlow starts from, SiT-XL/2 aligned with DINOv2-B (REPA): 4,000,000 steps at 256²,
# 2,000,000 at 512². Nobody has published B: the same settings, but block 4 is aligned instead of 8.
#   RESOLUTION=512 bash script/dmf/train_flow.sh [more flags of train.py, e.g. --no-compile]     or SIZE=B
SIZE=${SIZE:-XL}
RESOLUTION=${RESOLUTION:-256}
DATA_DIR=${DATA_DIR:-data/imagenet$RESOLUTION}
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model "SiT-$SIZE/2" --resolution "$RESOLUTION" --adam-beta2 0.95 \
    --ssl-align --enc-type dinov2-vit-b --max-train-steps $((4000000 * 256 / RESOLUTION)) "$@"
