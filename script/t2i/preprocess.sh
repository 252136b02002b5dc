#!/usr/bin/env bash
# MS-COCO 2014 as text-to-image training reads it: 256² crops, VAE moments, CLIP features of every caption.
#   COCO=coco bash script/t2i/preprocess.sh
# COCO holds train2014/, val2014/ and annotations/captions_{train,val}2014.json, as they unpack.
# Disk: features of the training captions take about 49 GB in fp16, of the validation captions 24 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

COCO=${COCO:-coco}
DATA_DIR=${DATA_DIR:-data/coco256}
NUM_GPUS=${NUM_GPUS:-8}
VAE=${VAE:-stabilityai/sd-vae-ft-ema}
TEXT_ENCODER=${TEXT_ENCODER:-openai/clip-vit-large-patch14}
STORED_DTYPE=${STORED_DTYPE:-fp16}         # fp32 doubles the disk

for split in train val; do
    dest=$DATA_DIR/$split
    python preprocessing/dataset_tools.py convert --source "$COCO/${split}2014" --dest "$dest/images" \
        --resolution 256x256 --transform center-crop
    torchrun --standalone --nproc-per-node "$NUM_GPUS" preprocessing/dataset_tools.py encode \
        --source "$dest/images" --dest "$dest/vae-sd" --vae "$VAE" --batch-size 64 --packed
    torchrun --standalone --nproc-per-node "$NUM_GPUS" preprocessing/dataset_tools.py captions \
        --source "$dest/images" --annotations "$COCO/annotations/captions_${split}2014.json" --dest "$dest/text" \
        --text-encoder "$TEXT_ENCODER" --stored-dtype "$STORED_DTYPE"
    python preprocessing/dataset_tools.py verify "$dest"
    python preprocessing/dataset_tools.py info "$dest"
done
echo "MS-COCO 2014 has 82,783 training and 40,504 validation images: compare the lines 'images' above."
