"""Train a text-to-image model (MMDiT, with or without DeepFlow) on VAE latents and the text features of captions.

    python train_t2i.py --exp-name coco --data-dir data/coco256/train
    accelerate launch train_t2i.py --exp-name baseline --model MMDiT-L/2 --data-dir coco256_features/train

Loop, losses, alignment and the run's folder are those of train.py; an image's caption is drawn anew in every step.
"""

from common.errors import exit_on_input_error
from common.flags import parse_early, parse_flags
from training.config import EXIT_CODES, TextTrainConfig

if __name__ == "__main__":
    parse_early(TextTrainConfig, __doc__, EXIT_CODES)

from train import train

if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(TextTrainConfig, description=__doc__, epilog=EXIT_CODES))
