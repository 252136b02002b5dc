#!/usr/bin/env bash
# DMFT-B/2 on ImageNet 256 with the settings published for XL; nobody has published numbers of this size.
#   CKPT=FILE bash script/dmf/train_b.sh [more flags of train_dmf.py, e.g. --g-type distill --omega 1.5]
# CKPT is the flow model to start from: a checkpoint of ours, or a published SiT, REPA or Decoupled MeanFlow file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

[ -n "${CKPT:-}" ] || fail "CKPT is not set; name the flow model to start from with CKPT=FILE"
train train_dmf.py --pretrained "$CKPT" --model DMFT-B/2 --checkpointing-steps 100000 "$@"
