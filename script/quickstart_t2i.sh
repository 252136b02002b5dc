#!/usr/bin/env bash
# Text-to-image DeepFlow end to end on handwritten digits with captions, on a laptop without GPU.
#   bash script/quickstart_t2i.sh [--help]
# Writes scikit-learn's handwritten digits as an image folder with captions in ten wordings ("a handwritten seven",
# "the digit 7", ...), encodes images and captions, trains DeepFlow-MMDiT-Ti/2, and samples 100 prompts in wordings
# that no caption has; a classifier counts how many images show the digit of their prompt. Takes minutes on two CPU cores;
# needs no GPU and downloads nothing but the packages. Everything goes to quickstart-t2i/ (another folder: WORK=...). A
# second run reuses finished steps. STEPS sets the number of training steps. TORCH_INDEX_URL and PYTHON as in
# script/quickstart.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/on_cpu.sh"
WORK=${WORK:-quickstart-t2i}
STEPS=${STEPS:-2000}
CKPT=$(checkpoint "$WORK/exps/digits" "$STEPS")

step "1/5 handwritten digits, their captions and a small text encoder: $WORK/digits, $WORK/text"
python -m digits.data --dest "$WORK/digits"
[ -e "$WORK/text/captions.json" ] || python -m digits.captions --digits "$WORK/digits" --dest "$WORK/text"

step "2/5 images, latents and text features: $WORK/data"
python -m preprocessing.dataset_tools convert --source "$WORK/digits" --dest "$WORK/data/images" \
    --resolution 32x32 --transform center-crop
python -m preprocessing.dataset_tools encode --source "$WORK/data/images" --dest "$WORK/data/vae-sd" \
    --vae assets/tiny-vae --per-proc-batch-size 64 --packed
python -m preprocessing.dataset_tools captions --source "$WORK/data/images" --annotations "$WORK/text/captions.json" \
    --dest "$WORK/data/text" --text-encoder "$WORK/text/encoder" --per-proc-batch-size 256

step "3/5 train DeepFlow-MMDiT-Ti/2, $STEPS steps: $WORK/exps/digits"
train train_t2i.py --exp-name digits --output-dir "$WORK/exps" --data-dir "$WORK/data" --resume auto \
    --model DeepFlow-MMDiT-Ti/2 --weighting lognormal --tg-upper-bound 0.01 --acc-coeff 1.0 \
    --batch-size 64 --learning-rate 2e-3 --adam-beta2 0.99 --ema-decay 0.998 \
    --max-train-steps "$STEPS" --checkpointing-steps 1000 --sampling-steps 1000 --log-every 50

step "4/5 sample 100 prompts that were not trained on: $WORK/samples"
sample generate_t2i.py --ckpt "$CKPT" --sample-dir "$WORK/samples" --prompts "$WORK/text/prompts.txt" \
    --per-proc-batch-size 25 --mode sde --num-steps 100 --cfg-scale 2.0

step "5/5 measure"
python -m digits.report --samples "$(newest_npz "$WORK/samples")" --out "$WORK/report.json" --grid "$WORK/grid.png"

cat <<EOF

done in $SECONDS s. Look at:
  $WORK/grid.png      every sample above its prompt
  $WORK/report.json   the numbers above
  $WORK/exps/digits   configuration, log, checkpoints, sample grids with their captions
Next: python generate_t2i.py --ckpt $CKPT \\
          --prompts "the digit 7" "a handwritten three" --grid 2x8 --out $WORK/mine.png
EOF
