"""Datasets of VAE moments with captions, for text-to-image. docs/text_to_image.md shows the layouts.

    data = open_captions("DATA")    # DATA/vae-sd and DATA/text, or a folder as U-ViT and REPA prepare it
    data.conditions(4)              # text features of four captions, those of the empty one, the captions

`text` is a packed set: a row of features per caption, sorted by image, whose "label" is the number of the image.

Letters: N images, M captions, B rows of a batch, L tokens, W width of the text features.
"""

import collections
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch

from dataset import (
    MANIFEST,
    DataInfo,
    FolderRows,
    ImageFiles,
    LatentDataset,
    Names,
    Pairing,
    StoredRows,
    find_set,
    image_set,
    open_features,
    open_images,
    open_moments,
    open_set,
    read_json,
    spec_of_vae,
)
from models.codec import LatentSpec
from models.errors import InputError, note
from models.text import TextSpec

TEXT = "text"
CAPTIONS = "captions.txt"  # the captions, lines padded to one width as those of names.txt
EMPTY = "empty.npy"  # features of the empty caption
PREPARE = "make it with preprocessing/dataset_tools.py captions"
FOREIGN_EMPTY = "empty_context.npy"  # of a folder as U-ViT prepares it; it lies beside train/ and val/


@dataclasses.dataclass(frozen=True)
class CaptionInfo(DataInfo):
    """What training must know of a dataset with captions; num_classes is 0."""

    captions: int = 0
    text: TextSpec = dataclasses.field(default_factory=TextSpec)

    def model_options(self):
        """Constructor arguments of a model for this data."""
        options = {**super().model_options(), "context_dim": self.text.width}
        del options["num_classes"]
        return options

    def __str__(self):
        return (
            f"{self.count:,} latents {self.moments_shape}, {self.captions:,} captions of {self.text.encoder}, "
            f"VAE {self.spec.vae} at scale {self.spec.scale}"
        )


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """Features of captions: rows (M, L, W), starts (N + 1,), image i has the rows starts[i] … starts[i + 1] − 1.

    captions: their texts, or None where the data does not say; empty: float32 (L, W), of the empty caption.
    """

    rows: object
    starts: np.ndarray
    captions: object
    empty: torch.Tensor

    def choose(self, indices, uniforms):
        """Rows of one caption for each image `indices`; uniforms: numbers in [0, 1) that choose."""
        first, after = self.starts[indices], self.starts[indices + 1]
        return first + (uniforms * (after - first)).astype(np.int64)

    def texts(self, rows):
        """The captions of rows."""
        return ["" if self.captions is None else self.captions[int(row)] for row in rows]


class CaptionDataset(LatentDataset):
    """Moments with the features of a caption in place of the label; of an image's captions each step draws one."""

    def __init__(self, info, rows, text, images=None, features=None, workers=4):
        super().__init__(info, rows, None, images, features=features, workers=workers)
        self.text, self._text_rows = text, StoredRows(text.rows)
        self._empty = text.empty

    def gather_step(self, sampler, step, rows, pin=False):
        """gather_stored of the given rows of the global batch of a step, with captions that the step draws."""
        indices = sampler.batch(step)[rows]
        chosen = self.text.choose(indices, sampler.uniforms(step)[rows])
        return self.gather_stored(indices, pin=pin, condition=self.context(chosen, pin))

    def context(self, rows, pin=False):
        """Features (B, L, W) of captions by row, in the precision in which they are stored."""
        return self._text_rows.gather(np.asarray(rows), np.zeros(len(rows), bool), self._pool, pin)

    def drop(self, labels, dropped):
        """Features (B, L, W), float32, with those of the empty caption where `dropped` (B,) is true."""
        if self._empty.device != labels.device:  # once: a copy in every step would wait for the device
            self._empty = self._empty.to(labels.device)
        return torch.where(dropped[:, None, None], self._empty, labels.float())

    def conditions(self, n):
        """Features of the first captions of n images, of the empty caption n times, and the captions."""
        rows = self.text.starts[np.arange(n) * len(self) // n]
        return self.context(rows).float(), self.text.empty.expand(n, -1, -1), self.text.texts(rows)


def open_captions(data_dir, *, images=False, features=(), data_vae=None, workers=4):
    """Open a data folder with captions; arguments as open_dataset's. Raises InputError for what does not fit."""
    if is_foreign(data_dir):
        return open_foreign(data_dir, images, features, data_vae, workers)
    folder, manifest, rows, _, names, spec = open_moments(data_dir, data_vae)
    place = folder.parent / TEXT
    if not place.is_dir():
        raise InputError(f"{place} is missing: the captions' features are read from it; {PREPARE}")
    text, text_spec = open_text(place, image_set(manifest), len(rows), folder)
    info = caption_info(rows, spec, text, text_spec)
    image_files = open_images(data_dir, folder, names, info) if images else None
    pairing = Pairing(folder, image_set(manifest), names, len(rows))
    return CaptionDataset(info, rows, text, image_files, open_features(data_dir, features, pairing), workers)


def caption_info(rows, spec, text, text_spec):
    """CaptionInfo of moments and captions."""
    return CaptionInfo(
        count=len(rows),
        num_classes=0,
        spec=spec,
        moments_shape=rows.shape,
        resolution=rows.shape[1] * spec.factor,
        captions=len(text.rows),
        text=text_spec,
    )


def open_text(place, images, count, moments):
    """(CaptionRows, TextSpec) of a set of captions of `count` images with the fingerprint `images` (None: unknown)."""
    manifest, rows, owners, _ = open_set(find_set(place, "."))
    try:
        spec = TextSpec(**(manifest or {})["text"])
    except (KeyError, TypeError):
        raise InputError(f"{place / MANIFEST} does not say which text encoder made the features; {PREPARE}") from None
    if rows.shape != (spec.tokens, spec.width):
        raise InputError(f"{place}: rows have shape {rows.shape}, its text encoder gives {(spec.tokens, spec.width)}")
    if images not in (None, manifest.get("images")) or manifest.get("image_count") != count:
        raise InputError(
            f"{place} holds captions of other images than {moments} was made from ({manifest.get('image_count')} and "
            f"{count}); {PREPARE}, of the same images"
        )
    starts = np.searchsorted(owners, np.arange(count + 1))
    if (np.diff(owners) < 0).any() or (np.diff(starts) < 1).any():
        raise InputError(f"{place}: captions are not in the order of the images, or an image has none; {PREPARE}")
    return CaptionRows(rows, starts, Names(place / CAPTIONS, len(rows)), read_empty(place / EMPTY, rows.shape)), spec


def read_empty(path, shape):
    """Features of the empty caption, float32 (L, W). Raises InputError."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: the empty caption's features are unreadable ({error}); {PREPARE}") from None
    if array.shape != tuple(shape):
        raise InputError(f"{path} has shape {array.shape}, the captions {tuple(shape)}; {PREPARE}")
    return torch.from_numpy(array.astype(np.float32))


# ------------------------------------------------------------------------------------ files of captions and prompts


def read_lines(path, where=None):
    """[(number, text)] of the lines of a UTF-8 file that are not blank, numbered from 1. Raises InputError.

    where: names the file in messages, with its flag; default: its path.
    """
    where = where or path
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); name another file") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{where} is empty; name another file")
    return found


def read_json_lines(path, where=None):
    """[(number, value)] of a JSON-lines file, as read_lines. Raises InputError naming the line."""
    values = []
    for number, line in read_lines(path, where):
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise InputError(f"{where or path}, line {number}: no JSON ({error}); restore the file") from None
    return values


def read_annotations(path, flag):
    """{image file name: [caption, …]} of COCO's JSON, or of a plain {file name: caption or list}. Raises InputError.

    flag: what named the file, for the message.
    """
    content = read_json(path)
    try:
        captions = _of_coco(content) if "annotations" in content else _of_mapping(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{flag} {path} is neither COCO's captions JSON nor {{file name: [captions]}} ({error}); correct it"
        ) from None
    if not captions:
        raise InputError(f"{flag} {path} holds no captions; name another file")
    return {name: [" ".join(caption.split()) for caption in group] for name, group in captions.items()}


def _of_coco(content):
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions = collections.defaultdict(list)
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
        captions[names[annotation["image_id"]]].append(annotation["caption"])
    return {name: captions[name] for name in names.values()}


def _of_mapping(content):
    return {name: [group] if isinstance(group, str) else list(group) for name, group in content.items()}


# ------------------------------------------------------------------------------- folders as U-ViT and REPA have them


class LogVarianceRows(FolderRows):
    """Moments stored as mean and log-variance, read as mean and std."""

    def _load(self, name, shape=None):
        mean, log_variance = np.split(super()._load(name, shape), 2)
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, -30, 20))])


def is_foreign(data_dir):
    """True for a folder of {i}.npy and {i}_{k}.npy with empty_context.npy beside it or in it."""
    return find_empty(data_dir) is not None and (Path(data_dir) / "0.npy").is_file()


def find_empty(data_dir):
    """empty_context.npy in the folder or beside it, else None."""
    folder = Path(data_dir).resolve()
    return next((f / FOREIGN_EMPTY for f in (folder, folder.parent) if (f / FOREIGN_EMPTY).is_file()), None)


def list_foreign(folder):
    """(N, [(i, k), …] sorted) of the files {i}.npy and {i}_{k}.npy. Raises InputError where a number is missing."""
    found, pairs = set(), []
    for path in Path(folder).glob("*.npy"):
        if match := re.fullmatch(r"(\d+)(?:_(\d+))?", path.stem):
            i, k = match.groups()
            found.add(int(i)) if k is None else pairs.append((int(i), int(k)))
    if missing := set(range(len(found))) - found:
        raise InputError(f"{folder}/{min(missing)}.npy is missing: latents are numbered from 0 on; restore it")
    captioned = {i for i, _ in pairs}
    if missing := found - captioned:
        raise InputError(f"{folder}/{min(missing)}.npy has no caption ({min(missing)}_0.npy); restore it")
    if stray := captioned - found:
        raise InputError(f"{folder}/{min(stray)}_0.npy is a caption without an image ({min(stray)}.npy); restore it")
    return len(found), sorted(pairs)


class CaptionFiles:
    """Texts {i}_{k}.txt; captions[row] is "" where there is no file, as U-ViT writes none."""

    def __init__(self, folder, pairs):
        self.folder, self.pairs = Path(folder), pairs

    def __getitem__(self, row):
        path = self.folder / "{}_{}.txt".format(*self.pairs[row])
        return " ".join(path.read_text("utf-8", "replace").split()) if path.is_file() else ""


def open_foreign(data_dir, images, features, data_vae, workers):
    """CaptionDataset of a folder of {i}.npy (mean and log-variance), {i}_{k}.npy (features) and {i}.png."""
    folder = Path(data_dir)
    count, pairs = list_foreign(folder)
    if features:
        raise InputError(f"{folder}: stored encoder features need DATA/vae-sd; compute them while training")
    spec = spec_of_vae(data_vae) if data_vae else LatentSpec()
    rows = LogVarianceRows(folder, [f"{i}.npy" for i in range(count)])
    if rows.shape[0] != 2 * spec.channels:
        raise InputError(
            f"{folder}/0.npy has shape {rows.shape}, not mean and log-variance of {spec.channels} channels"
        )
    contexts = FolderRows(folder, ["{}_{}.npy".format(*pair) for pair in pairs])
    text_spec = TextSpec(tokens=contexts.shape[0], width=contexts.shape[1])
    note(f"warning: {folder} does not say its encoders; taken as {spec.vae} at {spec.scale} and {text_spec.encoder}")
    starts = np.searchsorted([i for i, _ in pairs], np.arange(count + 1))
    empty = read_empty(find_empty(folder), contexts.shape)
    text = CaptionRows(contexts, starts, CaptionFiles(folder, pairs), empty)
    info = caption_info(rows, spec, text, text_spec)
    image_files = ImageFiles(folder, "{}.png".format, info.resolution) if images else None
    return CaptionDataset(info, rows, text, image_files, workers=workers)
