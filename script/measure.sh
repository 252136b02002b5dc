# Sourced by the eval recipes: checks what measuring needs before anything is sampled, samples, and measures.
# Environment, beside that of launch.sh:
#   CKPT               checkpoint (the last one of the run); for files that the authors released see docs/paper.md
#   LAST_STEP          step of that checkpoint, seven digits (the recipe's)
#   SAMPLE_DIR         folder of the samples (inside the run's)
#   NUM_FID_SAMPLES    number of images (50000)
#   REF                reference (docs/evaluation.md says where to get one), or none: sample only
#   INCEPTION_WEIGHTS  file of the network's weights; empty: torch-fidelity downloads them
#   DINOV2_WEIGHTS     the authors' file; empty: timm downloads them
#   RESULTS            folder of the results (results)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
CKPT=${CKPT:-$OUTPUT_DIR/$EXP_NAME/checkpoints/$LAST_STEP.pt}
NUM_FID_SAMPLES=${NUM_FID_SAMPLES:-50000}
REF=${REF:-}
RESULTS=${RESULTS:-results}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$OUTPUT_DIR/$EXP_NAME/.compile_cache} # shared by all settings
fast=(--compile --dtype bf16 --vae-dtype bf16 --per-proc-batch-size 64) # of generate*.py; flags given to a recipe follow
weights=(${INCEPTION_WEIGHTS:+--inception-weights "$INCEPTION_WEIGHTS"})
edm2_weights=(${weights[@]+"${weights[@]}"} ${DINOV2_WEIGHTS:+--dinov2-weights "$DINOV2_WEIGHTS"})

# The two suites: RUNNER (python or launch) SAMPLES JSON [flags]
adm() { "$1" -m evaluations.evaluator "$REF" "$2" --json "$3" ${weights[@]+"${weights[@]}"} "${@:4}"; }
edm2() { # FID and FD-DINOv2
    "$1" -m evaluations.calculate_metrics calc --images "$2" --ref "$REF" --num-images "$NUM_FID_SAMPLES" --json "$3" \
        ${edm2_weights[@]+"${edm2_weights[@]}"} "${@:4}"
}

need() { # VARIABLE [remedy]: the file that it names
    [ -e "${!1}" ] || fail "$1 ${!1} does not exist${2:+; $2}"
}

check_sampling() { # [flags]: the files, and the flags given to the recipe
    need CKPT "name a checkpoint with CKPT=FILE"
    for name in INCEPTION_WEIGHTS DINOV2_WEIGHTS; do [ -z "${!name:-}" ] || need "$name"; done
    local flags=" $* " name
    flags=${flags//_/-}
    for name in num-fid-samples=NUM_FID_SAMPLES=N num-samples=NUM_FID_SAMPLES=N sample-dir=SAMPLE_DIR=FOLDER ckpt=CKPT=FILE; do
        [[ $flags != *" --${name%%=*}"[\ =]* ]] || fail "pass ${name#*=} instead of --${name%%=*}"
    done
    [[ $REF = none || ! $flags =~ " --format"[\ =]"png "|" --no-create-npz " ]] \
        || fail "without an npz there is nothing to measure; leave out --format png and --no-create-npz, or pass REF=none"
}

check() { # SUITE REFERENCE FILE [flags]: everything but the samples; FILE: the usual name of such a reference
    check_sampling "${@:4}"
    [ -n "$REF" ] || fail "REF is not set: download $2 (docs/evaluation.md) and pass REF=$3, or REF=none to sample only"
    [ "$REF" != none ] || return 0
    need REF "docs/evaluation.md says where reference files come from"
    "$1" python samples "$RESULTS/$EXP_NAME.json" --check-only
}
check_adm() { check adm "ADM's reference batch" VIRTUAL_imagenet256_labeled.npz "$@"; }

newest_npz() { # FOLDER
    ls -t "$1"/*.npz 2>/dev/null | head -n 1 | grep . || fail "$1 holds no npz to measure; see the output of generate.py"
}

make_npz() { # FOLDER [flags of generate.py]; sets npz, which is empty if there is nothing to measure
    launch generate.py --ckpt "$CKPT" --sample-dir "$1" --num-fid-samples "$NUM_FID_SAMPLES" "${fast[@]}" "${@:2}"
    if [ "$REF" = none ]; then echo "REF=none: $1 is not measured"; npz=; else npz=$(newest_npz "$1"); fi
}

result_of() { # NPZ [SUFFIX]: file of its result; the npz's name may already contain the run's
    local name
    name=$(basename "$1" .npz)
    echo "$RESULTS/$EXP_NAME-${name#"$EXP_NAME-"}${2:-}.json"
}

sample_and_measure() { # NAME [flags of generate.py]: ADM's suite, with the SDE unless a flag names another sampler
    check_adm "${@:2}"
    make_npz "${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME/$1}" --mode sde "${@:2}"
    [ -n "$npz" ] || return 0
    adm launch "$npz" "$(result_of "$npz")"
    python -m evaluations.table "$(result_of "$npz")"
}

sample_and_measure_map() { # [flags of generate.py]: EDM2's FID and FD-DINOv2 with each number of STEPS (1 2 4)
    local steps json measured=()
    [[ " $* " != *" --num"[-_]"steps"[\ =]* ]] || fail "pass STEPS=\"1 2 4\" instead of --num-steps"
    check edm2 "Decoupled MeanFlow's statistics" imgnet256.pkl "$@"
    for steps in ${STEPS:-${NUM_STEPS:-1 2 4}}; do
        make_npz "${SAMPLE_DIR:-$OUTPUT_DIR/$EXP_NAME}/fid-steps-$steps" --mode euler --num-steps "$steps" "$@"
        [ -n "$npz" ] || continue
        json=$(result_of "$npz" "-steps-$steps")
        measured+=("$json")
        edm2 launch "$npz" "$json"
    done
    [ "$REF" = none ] || python -m evaluations.table "${measured[@]}"
}
