"""What images are made of: class labels, or prompts.

A condition is made of (config, Checkpoint, device). It gives y and the null condition of image indices, the manifest's
facts, the words in a picture (arguments of save_grid), and the store that its images go to.
"""

import dataclasses
import itertools
import os
import re
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, note, system_fault
from common.files import read_lines, regular, sha256_of_files
from common.pictures import classes_of_rows
from common.precision import DTYPES
from common.records import check_record, read_record_lines
from latents.captions import read_annotations
from models.checkpoints import TrainingData
from models.text import TextEncoder, TextSpec
from samplers import sample_labels
from sampling.stores import GenEvalFiles, PngFiles


class ClassLabels:
    """A class for each image, drawn by (seed, index) or taken in turn.

    A grid with --classes has equally many of each. Raises InputError for a text-to-image checkpoint, and for unknown
    classes.
    """

    def __init__(self, config, checkpoint, device):
        if checkpoint.model.kind == "text":
            raise InputError(f"{config.ckpt} is a text-to-image model; sample it with generate_t2i.py")
        self.mode, self.device, self.null, self.file = config.labels, device, checkpoint.options["num_classes"], None
        images = range(config.num_fid_samples)
        names = self.names = checkpoint.data_as(TrainingData).class_names or ()
        if classes := getattr(config, "classes", None):
            classes, _ = read_labels(classes, self.null, names, "--classes")
            labels = [classes[index * len(classes) // len(images)] for index in images]
            self.mode = ",".join(map(str, labels))
        elif config.labels == "random":
            labels = sample_labels(config.global_seed, images, self.null)
        else:
            classes = range(self.null)  # taken in turn
            if config.labels != "balanced":
                classes, self.file = read_labels(config.labels, self.null, names)
            labels = [classes[index % len(classes)] for index in images]
        self.labels = torch.as_tensor(labels)

    def of(self, indices):
        """Labels and null labels of images, int64 (N,) each, on the device."""
        y = self.labels[list(indices)].to(self.device, non_blocking=True)
        return y, torch.full_like(y, self.null)

    def facts(self):
        """Entries of the manifest."""
        sha256 = self.file and sha256_of_files(self.file)
        return {"label_mode": self.mode, "labels": self.labels.tolist(), "labels_sha256": sha256}

    def words(self, columns):
        """The classes beside each row."""
        return {"row_names": classes_of_rows(self.labels.tolist(), columns, self.names)}

    def image_store(self, folder):
        return PngFiles(folder)


def read_labels(text, num_classes, names=(), flag="--labels"):
    """(Classes, their file or None) of `207,robin`, a list of words, or a text file with a class per line.

    names: those of the classes. Raises InputError.
    """
    numbers = {name: number for number, name in enumerate(names)}
    file, words = None, [word.strip() for word in (text.split(",") if isinstance(text, str) else text)]
    text = text if isinstance(text, str) else ",".join(words)
    is_list = flag == "--classes" or all(word in numbers or re.fullmatch("[0-9]+", word) for word in words)
    if not is_list and (len(words) == 1 or os.path.exists(text)):
        try:
            lines, file = Path(regular(text)).read_text("utf-8-sig").split("\n"), text
            parts = (line.split() if re.fullmatch(r"[\d\s]*", line) else [line.strip()] for line in lines)
            words = [*itertools.chain(*parts)] or ["nothing"]
        except (OSError, UnicodeDecodeError) as error:
            fault = system_fault(error) or f"{text}: not random, balanced, a list like 207,robin or a text file"
            raise InputError(f"{flag} {fault}") from None
    labels = [int(word) if re.fullmatch("[0-9]{1,9}", word) else numbers.get(word, num_classes) for word in words]
    if max(labels) >= num_classes:
        wrong = next(word for word, label in zip(words, labels, strict=True) if label >= num_classes)
        named = f", or the name of one ({names[0]}, …)" if names else "; its data have no class names"
        raise InputError(f"{flag} {text}: {wrong!r} is not a class from 0 to {num_classes - 1}{named}")
    if word := next(
        (word for word, label in zip(words, labels, strict=True) if numbers.get(word, label) != label), None
    ):
        name = dict(enumerate(names)).get(int(word), "without a name")
        note(f"{flag} {text}: {word} is class number {int(word)}, {name}; the class of that name is {numbers[word]}")
    return labels, file


class Prompts:
    """A prompt for each image, as features of the text encoder that the model was trained with.

    source: the PromptList; load: as TextEncoder. Raises InputError for a class-conditional checkpoint, and for another
    text encoder.
    """

    def __init__(self, config, checkpoint, device, source, load=TextEncoder):
        if checkpoint.model.kind != "text":
            raise InputError(f"{config.ckpt} is a model of classes; sample it with generate.py")
        known = checkpoint.data.get("text", {"width": checkpoint.options["context_dim"]})
        trained = check_record(TextSpec, known, f"{config.ckpt}, data", "choose another file")
        self.encoder = load(config.text_encoder or trained.encoder, device)
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

    def words(self, _columns):
        """The prompt below each image."""
        return {"captions": self.captions}

    def image_store(self, folder):
        """GenEval's folders for its prompts, else one folder."""
        if self.source.metadata:
            return GenEvalFiles(folder, self.source.metadata, self.per_prompt)
        return PngFiles(folder)


@dataclasses.dataclass
class PromptList:
    """Prompts with the file they are from, and GenEval's records of them, or None."""

    texts: list
    path: Path | None = None
    metadata: list | None = None


@dataclasses.dataclass
class GenEvalPrompt:
    """What is read of GenEval's records {tag, include, prompt, …}; a result's folder gets all of them."""

    prompt: str


def read_prompts(given, seed):
    """PromptList from the words of --prompts: the prompts themselves, or one file. Raises InputError."""
    path = Path(given[0])
    looks_like_file = path.suffix in (".txt", ".json", ".jsonl") and " " not in given[0].strip()
    where = f"--prompts {path}"
    if len(given) > 1 or not (looks_like_file or os.path.isfile(path)):  # Path.is_file fails on a long prompt
        return PromptList([text.strip() for text in given])
    if path.suffix == ".json":
        return PromptList(one_caption_each(read_annotations(path, "--prompts"), seed, where), path)
    if path.suffix == ".jsonl":
        texts = [record.prompt for _, record in read_record_lines(GenEvalPrompt, path, where)]
        return PromptList(texts, path, [record for _, record in read_record_lines(dict, path, where)])
    return PromptList([text for _, text in read_lines(path, where)], path)


def one_caption_each(captions, seed, where):
    """A caption of every image, in the order of the names, drawn by (seed, number of the image). Raises InputError."""
    groups = [captions[name] for name in sorted(captions) if captions[name]]
    if not groups:
        raise InputError(f"{where} holds no captions; name another file")
    return [group[int(np.random.default_rng([seed, i, 0, 1]).integers(len(group)))] for i, group in enumerate(groups)]
