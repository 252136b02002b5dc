#!/usr/bin/env bash
# Text-to-image DeepFlow-3T on MS-COCO 256, 24 layers: 150,000 steps, the paper's FID 5.32 (with SSL=1 4.18).
#   DATA_DIR=data/coco256/train bash script/t2i/train.sh [more flags of train_t2i.py]
# The baseline: MODEL=MMDiT-L/2 bash script/t2i/train.sh
MODEL=${MODEL:-DeepFlow-MMDiT-L/2}
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
align=()
[ "${SSL:-0}" = 1 ] && align=(--ssl-align)
[[ ${SSL:-0} = 1 && $MODEL = DeepFlow-* ]] && align+=(--legacy-scaling)
train train_t2i.py --model "$MODEL" --checkpointing-steps 50000 ${align[@]+"${align[@]}"} "$@"
