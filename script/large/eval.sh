#!/usr/bin/env bash
# FID as the paper measures it: 50,000 samples, SDE, 250 steps, then ADM's suite. With guidance: script/guided.sh.
#   REF=VIRTUAL_imagenet256_labeled.npz bash script/large/eval.sh [more flags of generate.py]
EXP_NAME=${EXP_NAME:-deepflow-l-3t}
LAST_STEP=${LAST_STEP:-0400000}
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"
sample_and_measure fid "$@"
