#!/usr/bin/env bash
# FID as the paper measures it: 50,000 samples, SDE, 250 steps, no guidance, then ADM's suite against REF.
#   REF=VIRTUAL_imagenet256_labeled.npz bash script/base/eval.sh [more flags of generate.py]
# With guidance: script/guided.sh. A file that the authors released: CKPT=FILE, docs/paper.md has its flags.
set -euo pipefail
EXP_NAME=${EXP_NAME:-deepflow-b-2t}
LAST_STEP=${LAST_STEP:-0400000}
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"

sample_and_measure fid "$@"
