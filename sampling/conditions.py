"""What images are made of: class labels, or prompts.

A condition is made of (config, Checkpoint, device). It gives y and the null condition of image indices, the manifest's
facts, captions for a picture or None, and the store that its images go to.
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

    Raises InputError for a text-to-image checkpoint, and for unknown classes in --labels.
    """

    captions = None

    def __init__(self, config, checkpoint, device):
        if checkpoint.kind == "text":
            raise InputError(f"{config.ckpt} is a text-to-image model; sample it with generate_t2i.py")
        self.config, self.device, self.num_classes = config, device, checkpoint.options["num_classes"]
        self.classes, self.file = None, None  # to take in turn
        if config.labels == "balanced":
            self.classes = range(self.num_classes)
        elif config.labels != "random":
            self.classes, self.file = read_labels(config.labels, self.num_classes)

    def labels(self, indices):
        """int64 (N,); image i has classes[i mod their number] where they are taken in turn."""
        if self.classes is None:
            return sample_labels(self.config.global_seed, indices, self.num_classes)
        return torch.tensor([self.classes[index % len(self.classes)] for index in indices])

    def of(self, indices):
        """Labels and null labels of images, int64 (N,) each, on the device."""
        y = self.labels(indices).to(self.device)
        return y, torch.full_like(y, self.num_classes)

    def facts(self):
        """Entries of the manifest."""
        return {
            "label_mode": self.config.labels,
            "labels": self.labels(range(self.config.num_fid_samples)).tolist(),
            "labels_sha256": self.file and sha256_of_files(self.file),
        }

    def image_store(self, folder):
        return PngFiles(folder)


def read_labels(text, num_classes):
    """(Classes to take in turn, their file or None) of `207,360` or a text file. Raises InputError."""
    is_list = re.fullmatch(r"\d+(,\d+)*", text)
    try:
        words = text.split(",") if is_list else Path(text).read_text().split()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"--labels {text}: not random, balanced, a list like 207,360, nor a readable text file"
        ) from None
    wrong = [word for word in words or ["nothing"] if not word.isdecimal() or int(word) >= num_classes]
    if wrong:
        raise InputError(f"--labels {text}: {wrong[0]!r} is not a class from 0 to {num_classes - 1}")
    return [int(word) for word in words], None if is_list else text


class Prompts:
    """A prompt for each image, as features of the text encoder that the model was trained with.

    source: the PromptList. Raises InputError for a checkpoint of classes, and for another text encoder.
    """

    def __init__(self, config, checkpoint, device, source):
        if checkpoint.kind != "text":
            raise InputError(f"{config.ckpt} is a model of classes; sample it with generate.py")
        trained = TextSpec(**checkpoint.data.get("text", {"width": checkpoint.options["context_dim"]}))
        self.encoder = TextEncoder.load(config.text_encoder or trained.encoder, device)
        if "text" in checkpoint.data or self.encoder.spec.width != trained.width:
            trained.check_same(self.encoder.spec, config.ckpt, "--text-encoder")
        self.source, self.per_prompt, self.dtype = source, config.images_per_prompt, DTYPES[config.dtype]
        self.captions = config.prompt_of_each_image(source.texts)
        self.empty = self.encoder([""]).to(self.dtype)

    def of(self, indices):
        """Features of the images' prompts and of the empty caption, (N, L, W) in the network's dtype."""
        y = self.encoder([self.captions[index] for index in indices]).to(self.dtype)
        return y, self.empty.expand_as(y)

    def facts(self):
        """Entries of the manifest."""
        return {
            "label_mode": "prompts",
            "labels": self.captions,
            "labels_sha256": self.source.path and sha256_of_files(self.source.path),
            "text": dataclasses.asdict(self.encoder.spec),
        }

    def image_store(self, folder):
        """GenEval's folders for its prompts, else one folder."""
        if self.source.metadata:
            return GenEvalFiles(folder, self.source.metadata, self.per_prompt)
        return PngFiles(folder)
