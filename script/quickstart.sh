#!/usr/bin/env bash
# DeepFlow end to end on real handwritten digits, on a laptop without GPU.
#   bash script/quickstart.sh [--help]
# Sets up .venv, then writes scikit-learn's handwritten digits as an image folder, converts and encodes them, trains
# DeepFlow-Ti/2 (two branches), samples 400 digits and measures them. Takes minutes on two CPU cores; needs no GPU and
# downloads nothing but the packages. Everything goes to quickstart/ (another folder: WORK=...). A second run reuses
# finished steps; delete the folder to start again. STEPS sets the number of training steps.
# An active virtual or conda environment is used as it is, without making .venv.
# Environment: TORCH_INDEX_URL  wheel index for PyTorch, e.g. https://download.pytorch.org/whl/cpu (small CPU wheels)
#              PYTHON           interpreter that makes .venv (python3)
#              WORK             folder of the results (quickstart)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/on_cpu.sh"
WORK=${WORK:-quickstart}
STEPS=${STEPS:-3000}
CKPT=$(checkpoint "$WORK/exps/digits" "$STEPS")

step "1/6 handwritten digits as image folders: $WORK/digits, $WORK/digits-held-out"
python -m digits.data --dest "$WORK/digits" --held-out "$WORK/digits-held-out"

step "2/6 convert to 32x32: $WORK/data/images, $WORK/data-held-out/images"
for set in "" -held-out; do
    python -m preprocessing.dataset_tools convert --source "$WORK/digits$set" --dest "$WORK/data$set/images" \
        --resolution 32x32 --transform center-crop-dhariwal
done

step "3/6 encode with assets/tiny-vae: $WORK/data/vae-sd, $WORK/data-held-out/vae-sd"
for set in "" -held-out; do
    python -m preprocessing.dataset_tools encode --source "$WORK/data$set/images" --dest "$WORK/data$set/vae-sd" \
        --vae assets/tiny-vae --per-proc-batch-size 64
done

step "4/6 train DeepFlow-Ti/2, $STEPS steps: $WORK/exps/digits"
train train.py --exp-name digits --output-dir "$WORK/exps" --data-dir "$WORK/data" --resume auto \
    --model DeepFlow-Ti/2 --weighting lognormal --tg-upper-bound 0.01 --acc-coeff 1.0 \
    --batch-size 64 --learning-rate 4e-3 --adam-beta2 0.99 --ema-decay 0.998 \
    --max-train-steps "$STEPS" --checkpointing-steps 1000 --sampling-steps 1000 --log-every 50 \
    --holdout "$WORK/data-held-out" --holdout-every 1000

step "5/6 sample 400 digits: $WORK/samples"
sample generate.py --ckpt "$CKPT" --sample-dir "$WORK/samples" \
    --num-fid-samples 400 --labels balanced --per-proc-batch-size 50 --mode sde --num-steps 100

step "6/6 measure"
python -m digits.report --samples "$(newest_npz "$WORK/samples")" --out "$WORK/report.json" --grid "$WORK/grid.png" \
    --curve "$WORK/exps/digits/log.jsonl" "$WORK/curve.png"

cat <<EOF

done in $SECONDS s. Look at:
  $WORK/grid.png      samples, one class per row
  $WORK/curve.png     the loss of each part, and the error on held-out digits
  $WORK/report.json   the numbers above
  $WORK/exps/digits   configuration, log, checkpoints, sample grids
Next: edit a flag in script/quickstart.sh (--tg-upper-bound, --weighting, --model SiT-Ti/2) and run it with WORK=other,
or take your own image folder: README.md, "From here to ImageNet".
EOF
