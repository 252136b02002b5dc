#!/usr/bin/env bash
# FID with guidance (Tables 4 and 5). The paper states no scale, interval or sampler: a sweep measures small sets of
# images over SCALES, INTERVALS (LOW,HIGH of t, 0 is data) and STEPS; then 50,000 images with the setting of lowest FID.
#   REF=VIRTUAL_imagenet256_labeled.npz bash script/guided.sh [more flags of generate.py, e.g. --mode ode --heun]
EXP_NAME=${EXP_NAME:-deepflow-xl-3t}
LAST_STEP=${LAST_STEP:-2000000}
source "$(dirname "${BASH_SOURCE[0]}")/measure.sh"
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/guided}
SWEEP=${SWEEP:-$OUTPUT_DIR/$EXP_NAME/sweep-$(basename "$CKPT" .pt)} # its folder

check_adm "$@"
mkdir -p "$SAMPLE_DIR" 2>/dev/null && [ -w "$SAMPLE_DIR" ] \
    || fail "$SAMPLE_DIR cannot be written; name another place with SAMPLE_DIR=FOLDER"
[ "$REF" != none ] || fail "REF=none leaves nothing to choose the guidance by; pass REF=FILE"
python -m evaluations.sweep --ckpt "$CKPT" --ref "$REF" --out "$SWEEP" --num-fid-samples "${SWEEP_SAMPLES:-5000}" \
    --cfg-scale ${SCALES:-1.2 1.4 1.6 1.8} --interval ${INTERVALS:-0,1 0,0.7 0.3,0.7} --num-steps ${STEPS:-250} \
    --processes "$NUM_GPUS" ${weights[@]+"${weights[@]}"} -- "${fast[@]}" "$@"
read -ra best <"$SWEEP/best.txt"
sample_and_measure guided "${best[@]}" "$@"
