#!/usr/bin/env bash
# Table 6: FID, FD-DINOv2, IS and CLIP score on COCO's validation captions, and images for GenEval.
#   bash script/t2i/eval.sh [more flags of generate_t2i.py]
# References are the validation crops of script/t2i/preprocess.sh; REF=none: sample only.
# GENEVAL: its evaluation_metadata.jsonl; then images are made for it and checked (docs/text_to_image.md goes on).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-deepflow-t2i-3t}
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/0150000.pt}
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/samples-t2i}
VAL_JSON=${VAL_JSON:-coco/annotations/captions_val2014.json}
VAL_IMAGES=${VAL_IMAGES:-data/coco256/val/images} # folder, zip or npz
REF=${REF:-${VAL_IMAGES%/images}.pkl}      # statistics; made of VAL_IMAGES where the file is missing
CLIP=${CLIP:-openai/clip-vit-base-patch32}
GENEVAL=${GENEVAL:-}
NUM_GPUS=${NUM_GPUS:-8}
source script/measure.sh                   # INCEPTION_WEIGHTS and RESULTS from the environment

NUM_FID_SAMPLES=40192                      # of the 40,504 validation images, as REPA packs them
PER_PROC_BATCH_SIZE=64
MODE=sde
NUM_STEPS=250
CFG_SCALE=2.0

[ -e "$CKPT" ] || fail "CKPT $CKPT does not exist; name a checkpoint with CKPT=FILE"
[ -f "$VAL_JSON" ] || fail "VAL_JSON $VAL_JSON does not exist; name COCO's captions_val2014.json"
[ "$REF" = none ] || [ -e "$VAL_IMAGES" ] || fail "VAL_IMAGES $VAL_IMAGES does not exist; make it with script/t2i/preprocess.sh, or pass REF=none to sample only"
[ -z "$INCEPTION_WEIGHTS" ] || [ -f "$INCEPTION_WEIGHTS" ] || fail "INCEPTION_WEIGHTS $INCEPTION_WEIGHTS does not exist"
[ -z "$GENEVAL" ] || [ -f "$GENEVAL" ] || fail "GENEVAL $GENEVAL does not exist; name GenEval's evaluation_metadata.jsonl"

run() { torchrun --standalone --nproc-per-node "$NUM_GPUS" "$@"; }

sample() { # FOLDER PROMPTS [flags]
    run generate_t2i.py --ckpt "$CKPT" --sample-dir "$1" --prompts "$2" --per-proc-batch-size "$PER_PROC_BATCH_SIZE" \
        --mode "$MODE" --num-steps "$NUM_STEPS" --cfg-scale "$CFG_SCALE" "${@:3}"
}

measure() {
    local npz weights=() name=$RESULTS/$EXP_NAME
    npz=$(newest_npz "$SAMPLE_DIR/coco")
    [ -n "$INCEPTION_WEIGHTS" ] && weights=(--inception-weights "$INCEPTION_WEIGHTS")
    [ -f "$REF" ] || run evaluations/calculate_metrics.py ref --data "$VAL_IMAGES" --dest "$REF" ${weights[@]+"${weights[@]}"}
    run evaluations/calculate_metrics.py calc --images "$npz" --ref "$REF" --metrics fid,fd_dinov2 \
        --num-images "$NUM_FID_SAMPLES" --json "$name-coco.json" ${weights[@]+"${weights[@]}"}
    # ADM's suite for the Inception Score, over ten splits: its own, of 5,000 images, would leave a last one of 192
    run evaluations/evaluator.py "$VAL_IMAGES" "$npz" --splits 10 --json "$name-adm.json" ${weights[@]+"${weights[@]}"}
    python evaluations/clip_score.py "$npz" --clip "$CLIP" --json "$name-clip.json"
}

sample "$SAMPLE_DIR/coco" "$VAL_JSON" --num-fid-samples "$NUM_FID_SAMPLES" "$@"
[ "$REF" = none ] || measure
if [ -n "$GENEVAL" ]; then
    sample "$SAMPLE_DIR/geneval" "$GENEVAL" --format png "$@"
    python evaluations/geneval.py check "$(ls -td "$SAMPLE_DIR"/geneval/*/ | head -n 1)" "$GENEVAL"
fi
