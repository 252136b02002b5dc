#!/usr/bin/env bash
# FID and FD-DINOv2 of DMFT-XL/2 at 256², 50,000 samples, in 1, 2 and 4 steps without guidance, which is trained in.
#   REF=imgnet256.pkl STEPS="1 2 4" bash script/dmf/eval_xl.sh [more flags of generate.py, e.g. --mode restart]
EXP_NAME=${EXP_NAME:-dmft-xl}
LAST_STEP=${LAST_STEP:-0400000}
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"
sample_and_measure_map "$@"
