#!/usr/bin/env bash
# Table 6: FID, FD-DINOv2, IS and CLIP score on COCO's validation captions, and images for GenEval.
#   bash script/t2i/eval.sh [more flags of generate_t2i.py]
# References are the validation crops of script/t2i/preprocess.sh; REF=none: sample only.
# GENEVAL: its evaluation_metadata.jsonl; its images are then made and checked (docs/text_to_image.md goes on).
EXP_NAME=${EXP_NAME:-deepflow-t2i-3t}
LAST_STEP=${LAST_STEP:-0150000}
VAL_JSON=${VAL_JSON:-coco/annotations/captions_val2014.json}
VAL_IMAGES=${VAL_IMAGES:-data/coco256/val/images} # folder, zip or npz
REF=${REF:-${VAL_IMAGES%/images}.pkl}             # statistics, made of VAL_IMAGES where the file is missing
CLIP=${CLIP:-openai/clip-vit-base-patch32}
GENEVAL=${GENEVAL:-}
NUM_FID_SAMPLES=${NUM_FID_SAMPLES:-40192}         # of the 40,504 validation images, as REPA packs them
source "$(dirname "${BASH_SOURCE[0]}")/../measure.sh"
SAMPLE_DIR=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/samples-t2i}

sample() { # NAME PROMPTS [flags]
    launch generate_t2i.py --ckpt "$CKPT" --sample-dir "$SAMPLE_DIR/$1" --prompts "$2" "${fast[@]}" "${@:3}"
}

measure() { # RUNNER SAMPLES [flags]
    edm2 "$1" "$2" "$(result_of "$2" -coco)" "${@:3}"
    # ten splits for the Inception Score: ADM's splits of 5,000 images would leave a last one of 192
    REF=$VAL_IMAGES adm "$1" "$2" "$(result_of "$2" -adm)" --splits 10 "${@:3}"
    python -m evaluations.clip_score "$2" --clip "$CLIP" --json "$(result_of "$2" -clip)" "${@:3}"
}

check_sampling "$@"
need VAL_JSON "name COCO's captions_val2014.json"
[ "$REF" = none ] || need VAL_IMAGES "make it with script/t2i/preprocess.sh, or pass REF=none to sample only"
if [ -n "$GENEVAL" ]; then
    need GENEVAL "name GenEval's evaluation_metadata.jsonl"
    python -m evaluations.geneval score results.jsonl --metadata "$GENEVAL" --check-only
fi
if [ "$REF" != none ]; then
    [ -f "$REF" ] || launch -m evaluations.calculate_metrics ref --data "$VAL_IMAGES" --dest "$REF" \
        ${edm2_weights[@]+"${edm2_weights[@]}"}
    measure python samples --check-only
fi
sample coco "$VAL_JSON" --num-fid-samples "$NUM_FID_SAMPLES" "$@"
if [ "$REF" != none ]; then
    npz=$(newest_npz "$SAMPLE_DIR/coco")
    measure launch "$npz"
fi
if [ -n "$GENEVAL" ]; then
    sample geneval "$GENEVAL" --format png "$@"
    python -m evaluations.geneval check "$(ls -td "$SAMPLE_DIR"/geneval/*/ | head -n 1)" "$GENEVAL"
fi
