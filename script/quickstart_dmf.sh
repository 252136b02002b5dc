#!/usr/bin/env bash
# From the quickstart's flow model to a flow map that samples digits in one to four steps, on a laptop without GPU.
#   bash script/quickstart_dmf.sh [--help]
# Fine-tunes the flow model of script/quickstart.sh (run first if its checkpoint is missing) into the flow map
# DeepFlow-DMF-Ti/2, samples 400 digits with 1, 2 and 4 steps of the map and with 1, 2, 4 and 50 Euler steps of the flow
# model, and measures all of them. Takes minutes on two CPU cores; needs no GPU and downloads nothing but the packages.
# Everything goes to quickstart/ (another folder: WORK=...). A second run reuses finished steps. STEPS sets the number
# of training steps.
# TORCH_INDEX_URL and PYTHON as in script/quickstart.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/on_cpu.sh"
export WORK=${WORK:-quickstart}
STEPS=${STEPS:-600}
FLOW=$(checkpoint "$WORK/exps/digits" 3000)
CKPT=$(checkpoint "$WORK/exps/digits-map" "$STEPS")
[ -e "$FLOW" ] || STEPS=3000 bash script/quickstart.sh
SECONDS=0

step "1/3 fine-tune the flow model into DeepFlow-DMF-Ti/2, $STEPS steps: $WORK/exps/digits-map"
train train_dmf.py --exp-name digits-map --output-dir "$WORK/exps" --data-dir "$WORK/data" --resume auto \
    --model DeepFlow-DMF-Ti/2 --init-from "$FLOW" --g-type mg --omega 0.6 --g-min 0.0 --g-max 0.7 \
    --batch-size 64 --learning-rate 1e-3 --ema-decay 0.99 \
    --max-train-steps "$STEPS" --checkpointing-steps 300 --sampling-steps 300 --log-every 25

step "2/3 sample 400 digits each way: $WORK/samples-map"
samples=()
sample_as() { # NAME CKPT MODE STEPS
    local folder=$WORK/samples-map/$3-$4
    sample generate.py --ckpt "$2" --sample-dir "$folder" --num-fid-samples 400 --labels balanced \
        --per-proc-batch-size 50 --mode "$3" --num-steps "$4"
    samples+=("$1=$(newest_npz "$folder")")
}
for n in 1 2 4; do sample_as "flow map, steps: $n" "$CKPT" euler "$n"; done
for n in 1 2 4 50; do sample_as "flow model, Euler steps: $n" "$FLOW" ode "$n"; done

step "3/3 measure"
python -m digits.report --samples "${samples[@]}" --out "$WORK/report_map.json" --grid "$WORK/rows_map.png"

cat <<EOF

done in $SECONDS s. Look at:
  $WORK/rows_map.png      a row for each of the lines above, the same noise in all rows
  $WORK/report_map.json   the numbers above
  $WORK/exps/digits-map   log (error_flow and error_map are the curves to watch), grids of 1, 2 and 4 steps side by side
EOF
