#!/usr/bin/env bash
# Text-to-image DeepFlow end to end on handwritten digits with captions, on a laptop without GPU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: bash script/quickstart_t2i.sh [--help]

Writes scikit-learn's handwritten digits as an image folder with captions in ten wordings ("a handwritten seven", "the
digit 7", ...), encodes images and captions, trains a small DeepFlow on MMDiT, and samples 100 prompts that no caption
says in these words; a classifier counts how many images show the digit of their prompt. Minutes on two CPU cores; no
GPU, no downloads but the packages. Everything goes to quickstart-t2i/ (another folder: WORK=...). A second run reuses
finished steps. STEPS sets the number of training steps. TORCH_INDEX_URL and PYTHON as in script/quickstart.sh.
EOF
}
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    ?*) echo "error: unknown argument $1; see bash script/quickstart_t2i.sh --help" >&2; exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
WORK=${WORK:-quickstart-t2i}
STEPS=${STEPS:-2000}
SECONDS=0
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PROCESSES=$(($(env -u OMP_NUM_THREADS nproc) > 1 ? 2 : 1)) # nproc would answer OMP_NUM_THREADS
processes=(--num_processes "$PROCESSES")
[ "$PROCESSES" -gt 1 ] && processes+=(--multi_gpu --main_process_port 0) # accelerate's name for several processes, on CPU too
step() { printf '\n[%3ds] %s\n' "$SECONDS" "$*"; }

step "1/5 handwritten digits, their captions and a small text encoder: $WORK/digits, $WORK/text"
python preprocessing/digits.py --dest "$WORK/digits"
[ -e "$WORK/text/captions.json" ] || python preprocessing/digits_text.py --digits "$WORK/digits" --dest "$WORK/text"

step "2/5 images, latents and text features: $WORK/data"
python preprocessing/dataset_tools.py convert --source "$WORK/digits" --dest "$WORK/data/images" \
    --resolution 32x32 --transform center-crop
python preprocessing/dataset_tools.py encode --source "$WORK/data/images" --dest "$WORK/data/vae-sd" \
    --vae assets/tiny-vae --batch-size 64 --packed
python preprocessing/dataset_tools.py captions --source "$WORK/data/images" --annotations "$WORK/text/captions.json" \
    --dest "$WORK/data/text" --text-encoder "$WORK/text/encoder" --batch-size 256

step "3/5 train DeepFlow-MMDiT-Ti/2, $STEPS steps: $WORK/exps/digits"
accelerate launch "${processes[@]}" --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process 1 train_t2i.py \
    --exp-name digits --output-dir "$WORK/exps" --data-dir "$WORK/data" --resume auto \
    --model DeepFlow-MMDiT-Ti/2 --df-idxs "[2]" --scale-weight 0.2 1.0 \
    --weighting lognormal --tg-upper-bound 0.01 --acc-coeff 1.0 \
    --batch-size 64 --learning-rate 2e-3 --adam-beta2 0.99 --ema-decay 0.998 \
    --max-train-steps "$STEPS" --checkpointing-steps 1000 --sampling-steps 1000 --log-every 50

step "4/5 sample 100 prompts that were not trained on: $WORK/samples"
torchrun --standalone --nproc-per-node "$PROCESSES" generate_t2i.py \
    --ckpt "$WORK/exps/digits/checkpoints/$(printf %07d "$STEPS").pt" --sample-dir "$WORK/samples" \
    --prompts "$WORK/text/prompts.txt" --per-proc-batch-size 25 --mode sde --num-steps 100 --cfg-scale 2.0

step "5/5 measure"
npz=$(ls -t "$WORK"/samples/*.npz | head -n 1)
python evaluations/digits_prompts.py --samples "$npz" --out "$WORK/report.json" --grid "$WORK/grid.png"

cat <<EOF

done in $SECONDS s. Look at:
  $WORK/grid.png      every sample above its prompt
  $WORK/report.json   the numbers above
  $WORK/exps/digits   configuration, log, checkpoints, sample grids with their captions
Next: python generate_t2i.py --ckpt $WORK/exps/digits/checkpoints/$(printf %07d "$STEPS").pt \\
          --prompts "the digit 7" "a handwritten three" --grid 2x8 --out $WORK/mine.png
EOF
