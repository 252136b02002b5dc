#!/usr/bin/env bash
# DeepFlow-XL/2-3T on ImageNet 512: 2,000,000 steps (400 epochs), the paper's FID with guidance 2.22.
#   bash script/xlarge/train_512.sh [more flags of train.py, e.g. --ssl-align]
# Measured by script/xlarge/eval.sh and script/guided.sh, EXP_NAME=deepflow-xl-3t-512 REF=VIRTUAL_imagenet512.npz.
DATA_DIR=${DATA_DIR:-data/imagenet512}
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
train train.py --model DeepFlow-XL/2 --resolution 512 --max-train-steps 2000000 "$@"
