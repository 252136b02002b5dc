#!/usr/bin/env bash
# DeepFlow-L/2-3T on ImageNet 256: 400,000 steps (80 epochs).
#   bash script/large/train.sh [more flags of train.py, e.g. --tg-upper-bound 0.05]
# The baseline: bash script/large/train.sh --model SiT-L/2
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model DeepFlow-L/2 --checkpointing-steps 100000 "$@"
