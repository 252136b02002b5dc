# Sourced by quickstart*.sh and branches_study.sh with their arguments: help, environment, processes and helpers.
case "${1:-}" in
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; # the comment at their top
    ?*) echo "error: unknown argument $1; see bash $0 --help" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
SECONDS=0
[[ ${STEPS:-1} =~ ^[1-9][0-9]{0,6}$ ]] || fail "STEPS=$STEPS is no number of steps; pass one from 1 to 9999999"

# On CPU everywhere, so that the numbers are the same; two processes of one thread beat one of two on small tensors.
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning}
PROCESSES=$(($(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) > 1 ? 2 : 1)) # macOS has no nproc

step() { printf '\n[%3ds] %s\n' "$SECONDS" "$*"; }

launch() { python -m common.launch --standalone --nproc-per-node "$PROCESSES" "$@"; } # PROGRAM [flags]
# Two processes take longer to start. If the result exists, one is enough to find it complete, or to refuse to continue.
CKPT= # checkpoint of the run's last step
train() { # PROGRAM [flags]
    if [ -e "${CKPT%/*}" ]; then echo "continuing; changed settings need another folder: WORK=OTHER bash $0"; fi
    if [ -e "$CKPT" ]; then python "$@"; else launch "$@"; fi
}

sample() { # PROGRAM --ckpt CKPT --sample-dir FOLDER [flags]; if flags have changed, one process samples again
    if [ "$(newest_npz "$5" 2>/dev/null)" -nt "$3" ]; then python "$@"; else launch "$@"; fi
}
checkpoint() { # RUN STEP: its path; fails if the run has gone past this step without keeping it
    local wanted last
    wanted=$(printf '%s/checkpoints/%07d.pt' "$1" "$2")
    last=$(ls "$1"/checkpoints/*.pt 2>/dev/null | tail -n 1)
    [[ -e $wanted || ! $last > $wanted ]] \
        || fail "$1 went on to ${last##*/}, past STEPS=$2; raise STEPS, or take another folder: WORK=OTHER bash $0"
    echo "$wanted"
}
newest_npz() { ls -t "$1"/*.npz | head -n 1; } # FOLDER
