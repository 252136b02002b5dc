# Sourced by the recipes, which name only what differs from the programs' defaults (--help, or --dry-run, shows them).
# Environment: NUM_GPUS         processes on this machine (8); torchrun (common/launch.py) starts them, also a single one
#              OUTPUT_DIR       parent folder of the runs (exps)
#              EXP_NAME         name of the run; default: made of the model and what differs from the method
#              DATA_DIR         training data, where it is not the program's default
#              MIXED_PRECISION  no, fp16 or bf16; default: bf16 on GPUs. The published runs used fp16.
# Networks are compiled; flags given to a recipe follow its own, so --no-compile turns that off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NUM_GPUS=${NUM_GPUS:-8}
OUTPUT_DIR=${OUTPUT_DIR:-exps}
export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning} # from libraries, during import

fail() { echo "error: $*" >&2; exit 2; }
launch() { python -m common.launch --standalone --nproc-per-node "$NUM_GPUS" "$@"; }

train() { # PROGRAM [flags]
    # These signals reach every process, which saves and stops; a large checkpoint takes its time. See docs/cluster.md.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    exec python -m common.launch --standalone --nproc-per-node "$NUM_GPUS" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        "$1" --compile ${EXP_NAME:+--exp-name "$EXP_NAME"} --output-dir "$OUTPUT_DIR" --resume auto \
        ${DATA_DIR:+--data-dir "$DATA_DIR"} ${MIXED_PRECISION:+--mixed-precision "$MIXED_PRECISION"} "${@:2}"
}

train_map() { # [flags]; CKPT: the flow model to start from, ours or a published SiT, REPA or Decoupled MeanFlow file
    [ -n "${CKPT:-}" ] || fail "CKPT is not set; name the flow model to start from with CKPT=FILE"
    train train_dmf.py --init-from "$CKPT" "$@"
}
