#!/usr/bin/env bash
# Table 6: FID, FD-DINOv2, IS and CLIP score on COCO's validation captions, and images for GenEval.
#   VAL_JSON=captions_val2014.json REF=coco_val.pkl bash script/t2i/eval.sh [more flags of generate_t2i.py]
# REF: made once of the validation crops,
#   python evaluations/calculate_metrics.py ref --data data/coco256/val/images --dest coco_val.pkl
# GENEVAL: its evaluation_metadata.jsonl; then images are made for it and checked (docs/text_to_image.md goes on).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT_DIR=${OUTPUT_DIR:-exps}
EXP_NAME=${EXP_NAME:-deepflow-t2i-3t}
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/0150000.pt}
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/samples-t2i}
VAL_JSON=${VAL_JSON:-coco/annotations/captions_val2014.json}
VAL_IMAGES=${VAL_IMAGES:-data/coco256/val/images}
CLIP=${CLIP:-openai/clip-vit-base-patch32}
GENEVAL=${GENEVAL:-}
REF_NPZ=${REF_NPZ:-}
NUM_GPUS=${NUM_GPUS:-8}
source script/measure.sh # REF and RESULTS from the environment

NUM_FID_SAMPLES=40192                      # of the 40,504 validation images, as REPA packs them
PER_PROC_BATCH_SIZE=64
MODE=sde
NUM_STEPS=250
CFG_SCALE=2.0

[ -e "$CKPT" ] || fail "CKPT $CKPT does not exist; name a checkpoint with CKPT=FILE"
[ -f "$VAL_JSON" ] || fail "VAL_JSON $VAL_JSON does not exist; name COCO's captions_val2014.json"
[ -n "$REF" ] || fail "REF is not set: make it with evaluations/calculate_metrics.py ref --data $VAL_IMAGES --dest coco_val.pkl, or pass REF=none to sample only"
[ "$REF" = none ] || [ -f "$REF" ] || fail "REF $REF does not exist"

sample() { # FOLDER PROMPTS [flags]
    torchrun --standalone --nproc-per-node "$NUM_GPUS" generate_t2i.py --ckpt "$CKPT" --sample-dir "$1" \
        --prompts "$2" --per-proc-batch-size "$PER_PROC_BATCH_SIZE" \
        --mode "$MODE" --num-steps "$NUM_STEPS" --cfg-scale "$CFG_SCALE" "${@:3}"
}
sample "$SAMPLE_DIR/coco" "$VAL_JSON" --num-fid-samples "$NUM_FID_SAMPLES" "$@"
if [ "$REF" != none ]; then
    npz=$(newest_npz "$SAMPLE_DIR/coco")
    torchrun --standalone --nproc-per-node "$NUM_GPUS" evaluations/calculate_metrics.py calc --images "$npz" --ref "$REF" \
        --metrics fid,fd_dinov2 --num-images "$NUM_FID_SAMPLES" --json "$RESULTS/$EXP_NAME-coco.json"
    # IS, which needs no reference, comes with ADM's suite; its FID is the one of REF_NPZ, an npz of validation crops
    [ -z "$REF_NPZ" ] || torchrun --standalone --nproc-per-node "$NUM_GPUS" evaluations/evaluator.py "$REF_NPZ" "$npz" \
        --json "$RESULTS/$EXP_NAME-adm.json"
    python evaluations/clip_score.py "$npz" --clip "$CLIP" --json "$RESULTS/$EXP_NAME-clip.json"
fi
if [ -n "$GENEVAL" ]; then
    sample "$SAMPLE_DIR/geneval" "$GENEVAL" --format png "$@"
    python evaluations/geneval.py check "$(ls -td "$SAMPLE_DIR"/geneval/*/ | head -n 1)" "$GENEVAL"
fi
