#!/usr/bin/env bash
# From the quickstart's flow model to a flow map that samples digits in one to four steps, on a laptop without GPU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash script/quickstart_dmf.sh [--help]

Fine-tunes the flow model of script/quickstart.sh (which is run first where its checkpoint is missing) into a flow map,
samples 400 digits with 1, 2 and 4 steps of the map and with 1, 2, 4 and 50 Euler steps of the flow model, and measures
all of them. Minutes on two CPU cores; no GPU, no downloads but the packages. Everything goes to quickstart/ (another
folder: WORK=...). A second run reuses finished steps. TORCH_INDEX_URL and PYTHON as in script/quickstart.sh.
EOF
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    ?*) echo "error: unknown argument $1; see bash script/quickstart_dmf.sh --help" >&2; exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
export WORK=${WORK:-quickstart}
FLOW=$WORK/exps/digits/checkpoints/0003000.pt
STEPS=${STEPS:-600}
[ -e "$FLOW" ] || bash script/quickstart.sh
SECONDS=0
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PROCESSES=$(($(env -u OMP_NUM_THREADS nproc) > 1 ? 2 : 1)) # nproc would answer OMP_NUM_THREADS
processes=(--num_processes "$PROCESSES")
[ "$PROCESSES" -gt 1 ] && processes+=(--multi_gpu --main_process_port 0) # accelerate's name for several processes, on CPU too
step() { printf '\n[%3ds] %s\n' "$SECONDS" "$*"; }

step "1/3 fine-tune the flow model into a flow map, $STEPS steps: $WORK/exps/digits-map"
accelerate launch "${processes[@]}" --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process 1 train_dmf.py \
    --exp-name digits-map --output-dir "$WORK/exps" --data-dir "$WORK/data" --resume auto \
    --model DeepFlow-DMF-Ti/2 --pretrained "$FLOW" --dmf-depth 2 --g-type mg --omega 0.6 --g-min 0.0 --g-max 0.7 \
    --batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 \
    --max-train-steps "$STEPS" --checkpointing-steps 300 --sampling-steps 300 --log-every 25

step "2/3 sample 400 digits each way: $WORK/samples-map"
samples=()
sample() { # NAME CKPT MODE STEPS
    local dir=$WORK/samples-map/$3-$4
    torchrun --standalone --nproc-per-node "$PROCESSES" generate.py --ckpt "$2" --sample-dir "$dir" \
        --num-fid-samples 400 --labels balanced --per-proc-batch-size 50 --mode "$3" --num-steps "$4"
    samples+=("$1=$(ls -t "$dir"/*.npz | head -n 1)")
}
MAP=$WORK/exps/digits-map/checkpoints/$(printf %07d "$STEPS").pt
for n in 1 2 4; do sample "flow map, steps: $n" "$MAP" euler "$n"; done
for n in 1 2 4 50; do sample "flow model, Euler steps: $n" "$FLOW" ode "$n"; done

step "3/3 measure"
python evaluations/digits_compare.py --samples "${samples[@]}" --out "$WORK/report_map.json" --picture "$WORK/rows_map.png"

cat <<EOF

done in $SECONDS s. Look at:
  $WORK/rows_map.png      a row for each of the lines above, the same noises in all rows
  $WORK/report_map.json   the numbers above
  $WORK/exps/digits-map   log (error_flow and error_map are the curves to watch), grids of 1, 2 and 4 steps side by side
EOF
