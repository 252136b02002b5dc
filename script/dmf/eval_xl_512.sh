#!/usr/bin/env bash
# FID and FD-DINOv2 of DMFT-XL/2 at 512², 50,000 samples, in 1, 2 and 4 steps without guidance, which is trained in.
#   REF=imgnet512.pkl STEPS="1 2 4" bash script/dmf/eval_xl_512.sh [more flags of generate.py, e.g. --mode restart]
EXP_NAME=${EXP_NAME:-dmft-xl-512}
LAST_STEP=${LAST_STEP:-0800000}
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"
sample_and_measure_map --shift 1.5 "$@"
