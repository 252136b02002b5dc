# Sourced by */eval.sh: what measuring needs, checked before anything is sampled, and the measuring.
# Environment: REF                reference npz (docs/evaluation.md says where to get one), or none: sample only
#              INCEPTION_WEIGHTS  file of the network's weights; empty: torch-fidelity downloads them
#              RESULTS            folder of the results (results)

REF=${REF:-}
INCEPTION_WEIGHTS=${INCEPTION_WEIGHTS:-}
RESULTS=${RESULTS:-results}

fail() { echo "error: $*" >&2; exit 2; }

check_files() {
    [ -e "$CKPT" ] || fail "CKPT $CKPT does not exist; name a checkpoint with CKPT=FILE"
    [ -n "$REF" ] || fail "REF is not set: download ADM's reference batch (docs/evaluation.md) and pass REF=VIRTUAL_imagenet256_labeled.npz, or REF=none to sample only"
    [ "$REF" = none ] || [ -f "$REF" ] || fail "REF $REF does not exist; docs/evaluation.md says where reference files come from"
    [ -z "$INCEPTION_WEIGHTS" ] || [ -f "$INCEPTION_WEIGHTS" ] || fail "INCEPTION_WEIGHTS $INCEPTION_WEIGHTS does not exist"
}

newest_npz() { # of a folder
    ls -t "$1"/*.npz 2>/dev/null | head -n 1 | grep . || fail "$1 holds no npz to measure; leave out --format png"
}

measure_newest() { # the newest npz of a folder
    local npz json weights=()
    if [ "$REF" = none ]; then
        echo "REF=none: $1 is not measured"
        return
    fi
    npz=$(newest_npz "$1")
    [ -n "$INCEPTION_WEIGHTS" ] && weights=(--inception-weights "$INCEPTION_WEIGHTS")
    json=$RESULTS/$EXP_NAME-$(basename "$npz" .npz).json
    torchrun --standalone --nproc-per-node "$NUM_GPUS" evaluations/evaluator.py "$REF" "$npz" --json "$json" \
        ${weights[@]+"${weights[@]}"}
    python evaluations/table.py "$json"
}
