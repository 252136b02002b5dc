"""CLIP score: how well images show their prompts, in the three conventions in use.

    python -m evaluations.clip_score SAMPLES.npz                         # prompts from the manifest beside the samples
    python -m evaluations.clip_score FOLDER --prompts prompts.txt --clip openai/clip-vit-large-patch14 --json

raw is the mean cosine (the paper's 0.2954 … 0.3010), clipscore the mean of 2.5·max(cos, 0) with "A photo depicts"
before every prompt (Hessel et al.), torchmetrics the mean of 100·max(cos, 0). The paper does not name its CLIP model: a
number says little without the model, which is printed and stored with it.
"""

import dataclasses

from common.errors import InputError, exit_on_input_error
from common.files import read_lines
from common.flags import BATCH, flag, parse_early, parse_flags, required
from evaluations.metrics.results import AFTER_CHECK, BATCHES, SPEED, Result, ResultFlags, sample_labels

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


@dataclasses.dataclass(kw_only=True)
class ClipFlags(ResultFlags):
    samples: str = required("npz or folder of images", positional=True)
    prompts: str | None = flag(None, "a prompt per line; default: the manifest's", str, group="data", metavar="FILE")
    clip: str = flag(DEFAULT_CLIP, "name or folder of the CLIP model", group="model")
    batch_size: int = flag(64, "images per batch", range=BATCH, group=SPEED, name=BATCHES)
    device: str | None = flag(None, "cuda or cpu; default: the GPU if there is one", str, group=SPEED)


if __name__ == "__main__":
    parse_early(ClipFlags, __doc__)

import numpy as np
import torch
from PIL import Image

from common.processes import device_of_process
from common.progress import Progress
from evaluations.metrics.images import open_images
from models.encoders import CLIP_STATISTICS
from models.text import Tokens, load_clip

PREFIX = "A photo depicts "


class ClipScorer:
    """A CLIP model: cosines of images and prompts."""

    def __init__(self, name=DEFAULT_CLIP, device=None):
        self.device = device_of_process(device)
        tokenizer, self.model = load_clip("CLIPModel", name, self.device, "--clip")
        self.tokens = Tokens(tokenizer, self.model.config.text_config.max_position_embeddings)
        self.side = self.model.config.vision_config.image_size

    def pixels(self, images):
        """uint8 (N, H, W, 3) → float32 (N, 3, S, S): the whole image, bicubic, in CLIP's statistics."""
        size = (self.side, self.side)
        resized = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP_STATISTICS)
        return (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - mean) / std

    @torch.no_grad()
    def cosines(self, images, prompts):
        """(N,) cosines of uint8 images (N, H, W, 3) and their N prompts."""
        model = self.model
        vision = model.vision_model(pixel_values=self.pixels(images).to(self.device)).pooler_output
        text = model.text_model(input_ids=self.tokens(prompts).to(self.device)).pooler_output
        return torch.cosine_similarity(model.visual_projection(vision), model.text_projection(text)).cpu()


def conventions(cosines, prefixed):
    """The three scores of cosines with the prompts, (N,), and with "A photo depicts" before them, (N,)."""
    return {
        "clip_score_raw": cosines.double().mean().item(),
        "clip_score_clipscore": 2.5 * prefixed.double().clamp_min(0).mean().item(),
        "clip_score_torchmetrics": 100 * cosines.double().clamp_min(0).mean().item(),
    }


def score(images, prompts, scorer, batch_size=64):
    """The three scores of a set of images (NpzImages, FolderImages) with one prompt each."""
    if len(images) != len(prompts):
        raise InputError(f"{len(images)} images for {len(prompts)} prompts; name the prompts that the images are of")
    cosines, prefixed = [], []
    batches = np.split(np.arange(len(images)), range(batch_size, len(images), batch_size))
    for batch, pixels in zip(Progress(batches, unit="batch"), images.batches(batches), strict=True):
        cosines.append(scorer.cosines(pixels, [prompts[index] for index in batch]))
        prefixed.append(scorer.cosines(pixels, [PREFIX + prompts[index] for index in batch]))
    return conventions(torch.cat(cosines), torch.cat(prefixed))


def read_prompts(samples, count, path=None):
    """A prompt for each of `count` images: lines of a text file, or those beside the samples. Raises InputError."""
    if path is None:
        return sample_labels(samples, list[str], count, "name a file of prompts with --prompts, a line per image")
    return [text for _, text in read_lines(path, f"--prompts {path}")]


def main(argv=None):
    args = parse_flags(ClipFlags, argv, __doc__)
    path = args.result_path(args.samples)
    if args.check_only:
        ClipScorer(args.clip, args.device)
        return print(f"{args.clip}: ready to score\n{AFTER_CHECK}")
    images = open_images(args.samples, "samples")
    accepted = args.check_count(args.samples, len(images))
    prompts = read_prompts(args.samples, len(images), args.prompts)
    scores = score(images, prompts, ClipScorer(args.clip, args.device), args.batch_size)
    print(f"{len(images)} images, {args.clip}")
    print("\n".join(f"{name:24} {value:.4f}" for name, value in scores.items()))
    Result(scores, args.samples, clip=args.clip, count=len(images), warnings=accepted).write(path)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
