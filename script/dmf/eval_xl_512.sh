#!/usr/bin/env bash
# 50,000 samples of DMFT-XL/2 at 512² for FID, in NUM_STEPS steps (4) without guidance, which is trained in.
#   REF=VIRTUAL_imagenet512.npz NUM_STEPS=1 bash script/dmf/eval_xl_512.sh [more flags of generate.py, e.g. --mode restart]
set -euo pipefail
EXP_NAME=${EXP_NAME:-dmft-xl-512}
LAST_STEP=0800000
NUM_STEPS=${NUM_STEPS:-4}
RESULTS=${RESULTS:-results/steps-$NUM_STEPS}
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"

sample_and_measure "fid-steps-$NUM_STEPS" --mode euler --num-steps "$NUM_STEPS" --shift 1.5 "$@"
