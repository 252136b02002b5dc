"""Train a text-to-image model (MMDiT, with or without DeepFlow) on VAE latents and the text features of captions.

    python train_t2i.py --exp-name coco --data-dir data/coco256/train
    accelerate launch train_t2i.py --exp-name baseline --model MMDiT-L/2 --data-dir coco256_features/train

Loop, losses, alignment and the run's folder are those of train.py; an image's caption is drawn anew in every step.
"""

from pathlib import Path

from common.errors import exit_on_input_error
from common.flags import parse_flags
from dataset import CaptionInfo, open_captions
from models.codec import LatentSpec
from models.presets import COCO
from train import train
from training.alignment import find_caches
from training.config import TextTrainConfig
from training.stop import EXIT_CODES


def open_data(config):
    """The dataset's CaptionInfo and the dataset; a dry run may go without one and then assumes COCO's."""
    if config.dry_run and not Path(config.data_dir).exists():
        print(f"--data-dir {config.data_dir} does not exist: COCO, CLIP ViT-L/14 and the usual VAE are assumed")
        spec, resolution = LatentSpec(), config.resolution or COCO["resolution"]
        side = resolution // spec.factor
        return CaptionInfo(COCO["count"], 0, spec, (2 * spec.channels, side, side), resolution), None
    caches = find_caches(config)
    dataset = open_captions(
        config.data_dir,
        images=len(caches) < len(config.encoders()),
        features=tuple(caches),
        data_vae=config.data_vae,
        workers=config.num_workers,
    )
    return dataset.info, dataset


if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(TextTrainConfig, description=__doc__.splitlines()[0], epilog=EXIT_CODES), open_data)
