#!/usr/bin/env bash
# DMFT-B/2 on ImageNet 256 with the settings published for XL; nobody has published numbers of this size.
#   CKPT=FILE bash script/dmf/train_b.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train_map --model DMFT-B/2 --checkpointing-steps 100000 "$@"
