"""What images are made of: class labels, or prompts.

A condition gives y and the null condition of image indices, the manifest's facts, captions for a picture, and the store
that its images go to.
"""

import dataclasses
import re
from pathlib import Path

import torch

from common.errors import InputError
from common.files import sha256_of_files
from models.text import TextEncoder, TextSpec
from samplers import sample_labels
from sampling.flags import DTYPES
from sampling.stores import GenEvalFiles, PngFiles


class ClassLabels:
    """A class for each image, drawn by (seed, index) or taken in turn.

    mode: --labels; num_classes: of the model, and its null label.
    """

    def __init__(self, mode, seed, num_classes, device="cpu"):
        self.mode, self.seed, self.num_classes, self.device = mode, seed, num_classes, device
        self.classes = None  # to take in turn
        if mode != "random":
            self.classes = range(num_classes) if mode == "balanced" else read_labels(mode, num_classes)

    @classmethod
    def load(cls, config, checkpoint, device):
        """As the flags say. Raises InputError for a text-to-image checkpoint, and for unknown classes."""
        if checkpoint.kind == "text":
            raise InputError(f"{config.ckpt} is a text-to-image model; sample it with generate_t2i.py")
        return cls(config.labels, config.global_seed, checkpoint.options["num_classes"], device)

    def labels(self, indices):
        """int64 (N,); image i has classes[i mod their number] where they are taken in turn."""
        if self.classes is None:
            return sample_labels(self.seed, indices, self.num_classes)
        return torch.tensor([self.classes[index % len(self.classes)] for index in indices])

    def of(self, indices):
        """Labels and null labels of images, int64 (N,) each, on the device."""
        y = self.labels(indices).to(self.device)
        return y, torch.full_like(y, self.num_classes)

    def facts(self, count):
        """Entries of the manifest of `count` images."""
        is_file = self.mode not in ("random", "balanced") and Path(self.mode).is_file()
        return {
            "label_mode": self.mode,
            "labels": self.labels(range(count)).tolist(),
            "labels_sha256": sha256_of_files(self.mode) if is_file else None,
        }

    def captions(self):
        """A picture of classes has none."""
        return None

    def image_store(self, folder):
        return PngFiles(folder)


def read_labels(text, num_classes):
    """Classes to take in turn: `207,360`, or a text file with one per line. Raises InputError."""
    if re.fullmatch(r"\d+(,\d+)*", text):
        words = text.split(",")
    else:
        try:
            words = Path(text).read_text().split()
        except (OSError, UnicodeDecodeError):
            raise InputError(
                f"--labels {text} is neither random, balanced, a list like 207,360 nor a readable text file"
            ) from None
    wrong = [word for word in words if not word.isdecimal() or int(word) >= num_classes]
    if wrong or not words:
        found = repr(wrong[0]) if wrong else "nothing"
        raise InputError(f"--labels {text}: {found} is not a class from 0 to {num_classes - 1}")
    return [int(word) for word in words]


class Prompts:
    """A prompt for each image, as features of the text encoder.

    texts: prompt of each image; source: the PromptList they are from; per_prompt: images of each of its prompts.
    """

    def __init__(self, texts, source, per_prompt, encoder, dtype=torch.float32):
        self.texts, self.source, self.per_prompt, self.encoder, self.dtype = texts, source, per_prompt, encoder, dtype
        self.empty = encoder([""])

    @classmethod
    def load(cls, config, checkpoint, device, source):
        """Load the text encoder that the model was trained with. Raises InputError for another one."""
        if checkpoint.kind != "text":
            raise InputError(f"{config.ckpt} is a model of classes; sample it with generate.py")
        trained = TextSpec(**checkpoint.data.get("text", {"width": checkpoint.options["context_dim"]}))
        encoder = TextEncoder.load(config.text_encoder or trained.encoder, device)
        if "text" in checkpoint.data or encoder.spec.width != trained.width:
            trained.check_same(encoder.spec, config.ckpt, "--text-encoder")
        texts = config.prompt_of_each_image(source.texts)
        return cls(texts, source, config.images_per_prompt, encoder, DTYPES[config.dtype])

    def of(self, indices):
        """Features of the images' prompts and of the empty caption, (N, L, W) in the network's dtype."""
        y = self.encoder([self.texts[index] for index in indices])
        return y.to(self.dtype), self.empty.to(self.dtype).expand_as(y)

    def facts(self, count):
        """Entries of the manifest of `count` images."""
        return {
            "label_mode": "prompts",
            "labels": self.texts[:count],
            "labels_sha256": sha256_of_files(self.source.path) if self.source.path else None,
            "text": dataclasses.asdict(self.encoder.spec),
        }

    def captions(self):
        """Prompts of the images of a picture."""
        return self.texts

    def image_store(self, folder):
        """GenEval's folders for its prompts, else one folder."""
        if self.source.metadata:
            return GenEvalFiles(folder, self.source.metadata, self.per_prompt)
        return PngFiles(folder)
