#!/usr/bin/env bash
# DeepFlow-B/2-2T on ImageNet 256: 400,000 steps (80 epochs), the paper's FID 23.1.
#   bash script/base/train.sh [more flags of train.py, e.g. --tg-upper-bound 0.05]
# The baseline: bash script/base/train.sh --model SiT-B/2
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model DeepFlow-B/2 --checkpointing-steps 100000 "$@"
