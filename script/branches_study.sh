#!/usr/bin/env bash
# Measures how much sampling from the branches helps on the quickstart's digits.
#   bash script/branches_study.sh [--help]
# Trains the quickstart's model with several seeds on the quickstart's data (run script/quickstart.sh first) and
# measures internal guidance, exits, gaps and both guidances at equal cost: docs/branches.md. Takes hours on two CPU
# cores; start it again after an interruption. Everything goes to branches/ (another folder: WORK=...), curve by curve
# as table.md and plot.png: means and standard errors over the seeds.
# Environment: DATA       folder of the quickstart's data (quickstart/data)
#              SEEDS      of the runs ("0 1 2")
#              LENGTHS    training steps that are measured ("500 1000 3000"): the last, and multiples of 500
#              SAMPLES    images per point (2000)
#              SDE_STEPS  of a curve (25); at equal cost as many, 4/3 and twice as many
#              CURVES     ("internal exits gaps single both cheap")
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/on_cpu.sh"
WORK=${WORK:-branches}
DATA=${DATA:-quickstart/data}
N=${SDE_STEPS:-25}
read -ra lengths <<<"${LENGTHS:-500 1000 3000}"
last=${lengths[${#lengths[@]} - 1]} # [-1] needs bash 4.3
read -ra seeds <<<"${SEEDS:-0 1 2}"
[ -d "$DATA/vae-sd" ] || fail "$DATA has no latents; run script/quickstart.sh first, or name its folder with DATA=FOLDER"

for seed in "${seeds[@]}"; do
    step "train DeepFlow-Ti/2, $last steps, seed $seed: $WORK/exps/seed-$seed"
    train train.py --exp-name "seed-$seed" --output-dir "$WORK/exps" --data-dir "$DATA" --resume auto --seed "$seed" \
        --model DeepFlow-Ti/2 --weighting lognormal --tg-upper-bound 0.01 --acc-coeff 1.0 \
        --batch-size 64 --learning-rate 4e-3 --adam-beta2 0.99 --ema-decay 0.998 \
        --max-train-steps "$last" --checkpointing-steps 500 --sampling-steps 0 --log-every 50
done

curve() { # NAME SDE_STEPS [flags of evaluations.sweep]: of the checkpoints of $length
    [[ " ${CURVES:-internal exits gaps single both cheap} " = *" $1 "* ]] || return 0
    step "$1 after $length training steps: $WORK/$length/$1"
    python -m evaluations.sweep --ckpt "${ckpts[@]}" --ref digits --out "$WORK/$length/$1" --processes "$PROCESSES" \
        --num-fid-samples "${SAMPLES:-2000}" --num-steps "$2" "${@:3}" \
        -- --mode sde --weights "$weights" --labels balanced --per-proc-batch-size 50 --format npz
}

for length in "${lengths[@]}"; do
    ckpts=()
    # in shorter runs the average still holds more than 1% of the initial weights, 0.998^length
    if [ "$length" -lt 2300 ]; then weights=raw; else weights=ema; fi
    for seed in "${seeds[@]}"; do ckpts+=("$(printf '%s/checkpoints/%07d.pt' "$WORK/exps/seed-$seed" "$length")"); done
    # at most one evaluation per step: at most SDE_STEPS evaluations per image
    curve internal "$N" --ig-scale 1 1.25 1.5 2 3
    curve exits "$N" --exit-schedule 0.5:2 0.9:1 0.7:1 0.5:1 0:1 0.7:2,0:1 # the first has no early exit
    curve gaps "$N" --branch-gap 0 -0.01 0.01 0.02 dt
    # at the same cost, 2 * SDE_STEPS evaluations: without cfg, with it, and with a cheap unconditional half
    curve single $((2 * N)) --ig-scale 1 1.5
    curve both "$N" --cfg-scale 1.5 --ig-scale 1 1.5
    curve cheap $((4 * N / 3)) --cfg-scale 1.5 --cfg-exit 1 --ig-scale 1 1.5
done

echo "done in $SECONDS s: $(printf '%s ' "$WORK"/*/*/table.md)"
