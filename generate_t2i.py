"""Sample images of prompts from a text-to-image checkpoint; everything else is as in generate.py.

    python generate_t2i.py --ckpt CKPT --prompts "a cat on a sofa" "two red buses" --grid 2x4 --out cats.png
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts captions_val2014.json --num-fid-samples 40192
    torchrun --nproc-per-node 8 generate_t2i.py --ckpt CKPT --prompts evaluation_metadata.jsonl --format png  # GenEval

The manifest's `labels` are the prompts of all images.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.errors import InputError, exit_on_input_error
from common.files import read_json_lines, read_lines
from common.flags import flag, parse_flags
from generate import DTYPES, GenerateConfig, ImageSampler, generate
from latents.captions import read_annotations
from models.text import TextEncoder, TextSpec
from sampling.stores import GENEVAL_IMAGES, GenEvalFiles


@dataclasses.dataclass
class TextGenerateConfig(GenerateConfig):
    """What generate_t2i.py can be told: generate.py's flags with prompts in place of classes."""

    num_classes: ClassVar = None
    labels: ClassVar = "prompts"
    classes: ClassVar = None

    prompts: str = flag(
        None,
        "prompts ('' is no text at all), or one file: text with a prompt per line, COCO's captions .json (one caption "
        "per image, drawn by the seed), GenEval's .jsonl (its folder layout is written)",
        str,
        nargs="+",
    )
    images_per_prompt: int = flag(None, "images of each prompt; default 1, for GenEval 4", int)
    text_encoder: str = flag(None, "name or folder of the text encoder; default: the one of the training data", str)
    cfg_scale: float = flag(2.0, "classifier-free guidance with the empty caption; 1.0 is none")
    num_fid_samples: int = flag(None, "number of images; default: all prompts, each --images-per-prompt times", int)

    def check(self):
        """Read the prompts, and raise InputError for values that make no sense."""
        if not self.prompts:
            raise InputError("--prompts is missing: name prompts, or a file of them")
        self.listed = read_prompts(self.prompts, self.global_seed)
        if self.images_per_prompt is None:
            self.images_per_prompt = GENEVAL_IMAGES if self.listed.metadata else 1
        if self.images_per_prompt < 1:
            raise InputError(f"--images-per-prompt {self.images_per_prompt} must be at least 1")
        count = len(self.listed.texts) * self.images_per_prompt
        self.num_fid_samples = count if self.num_fid_samples is None else self.num_fid_samples
        if self.num_fid_samples > count:
            raise InputError(
                f"--num-fid-samples {self.num_fid_samples}: --prompts gives {count} images; raise --images-per-prompt"
            )
        super().check()

    def check_grid(self):
        """Turn --grid into a number of images: as many of each prompt, one prompt after the other."""
        rows, columns = self.grid_size()
        self.num_fid_samples, self.out = rows * columns, self.out or "grid.png"
        if len(self.listed.texts) > self.num_fid_samples:
            raise InputError(f"--grid {self.grid} has no room for {len(self.listed.texts)} prompts; pass a larger one")

    def prompt_of(self, index):
        """The prompt of image `index`."""
        texts = self.listed.texts
        if self.grid:
            return texts[index * len(texts) // self.num_fid_samples]
        return texts[index // self.images_per_prompt]


@dataclasses.dataclass
class Prompts:
    """Prompts with the file they are from, and GenEval's records of them, or None."""

    texts: list
    path: Path | None = None
    metadata: list | None = None


def read_prompts(given, seed):
    """Prompts from the words of --prompts: the prompts themselves, or one file. Raises InputError."""
    path = Path(given[0])
    looks_like_file = path.suffix in (".txt", ".json", ".jsonl") and " " not in given[0].strip()
    where = f"--prompts {path}"
    if len(given) > 1 or not (looks_like_file or is_file(path)):
        return Prompts([text.strip() for text in given])
    if path.suffix == ".json":
        return Prompts(one_caption_each(read_annotations(path, "--prompts"), seed, where), path)
    if path.suffix == ".jsonl":
        records = read_geneval(path, where)
        return Prompts([record["prompt"] for record in records], path, records)
    return Prompts([text for _, text in read_lines(path, where)], path)


def is_file(path):
    """Whether there is such a file; a long prompt is no name of one."""
    try:
        return path.is_file()
    except OSError:
        return False


def one_caption_each(captions, seed, where):
    """A caption of every image, in the order of the names, drawn by (seed, number of the image). Raises InputError."""
    groups = [captions[name] for name in sorted(captions) if captions[name]]
    if not groups:
        raise InputError(f"{where} holds no captions; name another file")
    return [group[int(np.random.default_rng([seed, i, 0, 1]).integers(len(group)))] for i, group in enumerate(groups)]


def read_geneval(path, where):
    """GenEval's records {tag, include, prompt, …}. Raises InputError naming the line."""
    records = read_json_lines(path, where)
    for number, record in records:
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f"{where}, line {number}: not a record with a 'prompt'; restore the file")
    return [record for _, record in records]


class TextSampler(ImageSampler):
    """An ImageSampler whose condition is the text features of each image's prompt."""

    def prepare_labels(self):
        """Load the text encoder that the model was trained with. Raises InputError for another one."""
        config, options = self.config, self.checkpoint.options
        if "context_dim" not in options:
            raise InputError(f"{config.ckpt} is a model of classes; sample it with generate.py")
        trained = TextSpec(**self.checkpoint.data.get("text", {"width": options["context_dim"]}))
        self.encoder = TextEncoder.load(config.text_encoder or trained.encoder, self.device)
        if "text" in self.checkpoint.data or self.encoder.spec.width != trained.width:
            trained.check_same(self.encoder.spec, config.ckpt, "--text-encoder")
        self.empty = self.encoder([""])

    def conditions(self, indices):
        """Text features of the images' prompts and of the empty caption, (N, L, W) in the network's dtype."""
        y = self.encoder([self.config.prompt_of(index) for index in indices])
        dtype = DTYPES[self.config.dtype]
        return y.to(dtype), self.empty.to(dtype).expand_as(y)

    def label_facts(self):
        """As ImageSampler's; `labels` are the prompts."""
        path = self.config.listed.path
        return {
            "label_mode": "prompts",
            "labels": self.captions(),
            "labels_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path else None,
            "text": dataclasses.asdict(self.encoder.spec),
        }

    def captions(self):
        """Prompts of all images."""
        return [self.config.prompt_of(index) for index in range(self.config.num_fid_samples)]

    def open_store(self, folder):
        """Where finished images are kept: for GenEval's prompts in its folders."""
        config = self.config
        if config.listed.metadata and config.decode and config.format != "npz":
            return GenEvalFiles(folder, config.listed.metadata, config.images_per_prompt)
        return super().open_store(folder)


if __name__ == "__main__":
    with exit_on_input_error():
        generate(parse_flags(TextGenerateConfig, description=__doc__.splitlines()[0]), TextSampler)
