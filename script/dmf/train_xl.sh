#!/usr/bin/env bash
# DMFT-XL/2 on ImageNet 256 with the published settings: 400,000 steps; published FID 2.16 in 1 step, 1.51 in 4.
#   CKPT=FILE bash script/dmf/train_xl.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
# CKPT is the flow model to start from: a checkpoint of ours, or a published SiT, REPA or Decoupled MeanFlow file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

[ -n "${CKPT:-}" ] || fail "CKPT is not set; name the flow model to start from with CKPT=FILE"
train train_dmf.py --pretrained "$CKPT" --model DMFT-XL/2 --checkpointing-steps 100000 "$@"
