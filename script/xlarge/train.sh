#!/usr/bin/env bash
# DeepFlow-XL/2-3T on ImageNet 256: 2,000,000 steps (400 epochs), the paper's FID 7.2.
#   bash script/xlarge/train.sh [more flags of train.py, e.g. --tg-upper-bound 0.05]
# The baseline: bash script/xlarge/train.sh --model SiT-XL/2
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model DeepFlow-XL/2 --max-train-steps 2000000 "$@"
