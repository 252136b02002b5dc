"""CLIP score: how well images show their prompts, in the three conventions in use.

    python evaluations/clip_score.py SAMPLES.npz                         # prompts from the manifest beside the samples
    python evaluations/clip_score.py FOLDER --prompts prompts.txt --clip openai/clip-vit-large-patch14 --json

raw is the mean cosine (the paper's 0.2954 … 0.3010), clipscore the mean of 2.5·max(cos, 0) with "A photo depicts"
before every prompt (Hessel et al.), torchmetrics the mean of 100·max(cos, 0). The paper does not name its CLIP model: a
number says little without the model, which is printed and stored with it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, exit_on_input_error
from common.files import read_lines
from evaluations.metrics.images import open_images
from evaluations.metrics.results import manifest_path, result_path, write_result
from models.encoders import CLIP_STATISTICS
from models.text import Tokens, load_clip
from preprocessing.jobs import Batches

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
PREFIX = "A photo depicts "


class ClipScorer:
    """A CLIP model: cosines of images and prompts."""

    def __init__(self, name=DEFAULT_CLIP, device="cpu"):
        tokenizer, self.model = load_clip("CLIPModel", name, device, "--clip")
        self.tokens = Tokens(tokenizer, self.model.config.text_config.max_position_embeddings)
        self.side = self.model.config.vision_config.image_size
        self.name, self.device = name, device

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
        pair = model.visual_projection(vision), model.text_projection(text)
        return torch.cosine_similarity(*pair, dim=-1).cpu()


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
    found, batches = [], [np.array(batch) for batch in Batches(len(images), batch_size)]
    for batch, pixels in zip(tqdm(batches, unit="batch"), images.batches(batches), strict=True):
        texts = [prompts[index] for index in batch]
        prefixed = [PREFIX + text for text in texts]
        found.append(torch.stack([scorer.cosines(pixels, texts), scorer.cosines(pixels, prefixed)]))
    return conventions(*torch.cat(found, dim=1))


def read_prompts(samples, path=None):
    """A prompt per image: lines of a text file, or `labels` of the manifest beside the samples. Raises InputError."""
    if path:
        return [text for _, text in read_lines(path, f"--prompts {path}")]
    source = manifest_path(samples)
    try:
        prompts = json.loads(source.read_text(encoding="utf-8"))["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source}: no prompts can be read ({error}); name a file of them with --prompts") from None
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{source} holds no prompts; name a file of them with --prompts, a line per image")
    return prompts


def parse_args(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("samples", help="npz or folder of images")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt per line; default: the manifest beside the samples")
    parser.add_argument("--clip", default=DEFAULT_CLIP, help=f"name or folder of the CLIP model ({DEFAULT_CLIP})")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="cuda or cpu")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write it; default results/NAME.json")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    images, prompts = open_images(args.samples, "samples"), read_prompts(args.samples, args.prompts)
    scores = score(images, prompts, ClipScorer(args.clip, args.device), args.batch_size)
    print(f"{len(images)} images, {args.clip}")
    print("\n".join(f"{name:24} {value:.4f}" for name, value in scores.items()))
    if args.json is not None:
        write_result(result_path(args.json, args.samples), args.samples, scores, clip=args.clip, images=len(images))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
