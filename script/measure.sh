# Sourced by the eval.sh recipes: checks what measuring needs before anything is sampled, samples, and measures.
# Environment, beside that of launch.sh:
#   CKPT               checkpoint (the last one of the run)
#   SAMPLE_DIR         folder of the samples (inside the run's)
#   REF                reference npz (docs/evaluation.md says where to get one), or none: sample only
#   INCEPTION_WEIGHTS  file of the network's weights; empty: torch-fidelity downloads them
#   RESULTS            folder of the results (results)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/$LAST_STEP.pt}
REF=${REF:-}
INCEPTION_WEIGHTS=${INCEPTION_WEIGHTS:-}
RESULTS=${RESULTS:-results}
weights=(${INCEPTION_WEIGHTS:+--inception-weights "$INCEPTION_WEIGHTS"})

need() { # VARIABLE [remedy]: the file that it names
    [ -e "${!1}" ] || fail "$1 ${!1} does not exist${2:+; $2}"
}

check_weights() {
    need CKPT "name a checkpoint with CKPT=FILE"
    [ -z "$INCEPTION_WEIGHTS" ] || need INCEPTION_WEIGHTS
}

newest_npz() { # FOLDER
    ls -t "$1"/*.npz 2>/dev/null | head -n 1 | grep . || fail "$1 holds no npz to measure; leave out --format png"
}

sample_and_measure() { # NAME [flags of generate.py]
    local npz json folder=${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/$1}
    check_weights
    [ -n "$REF" ] || fail "REF is not set: download ADM's reference batch (docs/evaluation.md) and pass REF=VIRTUAL_imagenet256_labeled.npz, or REF=none to sample only"
    [ "$REF" = none ] || need REF "docs/evaluation.md says where reference files come from"
    launch generate.py --ckpt "$CKPT" --sample-dir "$folder" --per-proc-batch-size 64 "${@:2}"
    [ "$REF" != none ] || { echo "REF=none: $folder is not measured"; return; }
    npz=$(newest_npz "$folder")
    json=$RESULTS/$EXP_NAME-$(basename "$npz" .npz).json
    launch -m evaluations.evaluator "$REF" "$npz" --json "$json" ${weights[@]+"${weights[@]}"}
    python -m evaluations.table "$json"
}
