#!/usr/bin/env bash
# The baseline: SiT on ImageNet 256, 400,000 steps (80 epochs); the paper's FID is 29.7 for B, 16.1 for L, 13.8 for XL.
#   SIZE=B bash script/sit/train.sh [more flags of train.py, e.g. --weighting uniform, --ssl-align --enc-type dinov1-vit-b]
# The paper's longest is XL's, 800 epochs: --max-train-steps 4000000. Measured by EXP_NAME=sit-b bash script/base/eval.sh.
SIZE=${SIZE:-XL} # S, B, L or XL
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model "SiT-$SIZE/2" --checkpointing-steps 100000 "$@"
