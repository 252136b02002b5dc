#!/usr/bin/env bash
# DMFT-XL/2 on ImageNet 256 with the published settings: 400,000 steps; published FID 2.16 in 1 step, 1.51 in 4.
#   CKPT=FILE bash script/dmf/train_xl.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train_map --model DMFT-XL/2 --checkpointing-steps 100000 "$@"
