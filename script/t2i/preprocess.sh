#!/usr/bin/env bash
# MS-COCO 2014 as text-to-image training reads it: 256² crops, VAE moments, CLIP features of every caption.
#   COCO=coco bash script/t2i/preprocess.sh
# COCO holds train2014/, val2014/ and annotations/captions_{train,val}2014.json, as they unpack.
# VAE, TEXT_ENCODER and STORED_DTYPE replace the defaults of `encode` and `captions`.
# Disk: in fp16, features of the training captions take about 49 GB, of the validation captions 24 GB; fp32 doubles both.
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
COCO=${COCO:-coco}
DATA_DIR=${DATA_DIR:-data/coco256}
TRAIN_COUNT=${TRAIN_COUNT-82783}   # images of MS-COCO 2014; set to nothing for images of your own
VAL_COUNT=${VAL_COUNT-40504}

tool() { python -m preprocessing.dataset_tools "$@"; }

check_count() { # FOLDER EXPECTED
    local found
    found=$(tool info "$1" | awk '$1 == "holds" { print $2 }')
    [ -z "$2" ] || [ "$found" = "$2" ] || fail "$1 holds $found images instead of $2; unpack the whole set, remove $1" \
        "and run again, or pass TRAIN_COUNT= VAL_COUNT= for images of your own"
}

prepare() { # SPLIT COUNT
    local dest=$DATA_DIR/$1
    tool convert --source "$COCO/${1}2014" --dest "$dest/images" --resolution 256x256 --transform center-crop
    check_count "$dest/images" "$2"
    launch -m preprocessing.dataset_tools encode --source "$dest/images" --dest "$dest/vae-sd" \
        ${VAE:+--vae "$VAE"} --per-proc-batch-size 64 --packed
    launch -m preprocessing.dataset_tools captions --source "$dest/images" --dest "$dest/text" \
        --annotations "$COCO/annotations/captions_${1}2014.json" \
        ${TEXT_ENCODER:+--text-encoder "$TEXT_ENCODER"} ${STORED_DTYPE:+--stored-dtype "$STORED_DTYPE"}
    tool verify "$dest"
    tool info "$dest"
}
prepare train "$TRAIN_COUNT"
prepare val "$VAL_COUNT"
