"""Captions: the packed set `text` of a data folder, whose labels number the images, and the JSON files it comes from.

Letters: N images, M captions, L tokens, W width of the features.
"""

import dataclasses

import numpy as np
import torch

from common.errors import InputError
from common.files import read_bytes
from common.records import parse_record
from latents.manifest import TEXT
from latents.names import Names
from latents.rows import read_floats
from latents.sets import find_set, open_set
from models.text import TextSpec

CAPTIONS = "captions.txt"  # the captions, lines padded to one width as those of names.txt
EMPTY = "empty.npy"  # features of the empty caption
PREPARE = "make it with preprocessing/dataset_tools.py captions"


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """Features of captions: rows (M, L, W), starts (N + 1,), image i has the rows starts[i] … starts[i + 1] − 1.

    captions: their texts; empty: float32 (L, W), of the empty caption; spec: of the encoder.
    """

    rows: object
    starts: np.ndarray
    captions: object
    empty: torch.Tensor
    spec: TextSpec

    def choose(self, indices, uniforms):
        """Rows of one caption for each image `indices`; numbers `uniforms` in [0, 1) choose."""
        first, after = self.starts[indices], self.starts[indices + 1]
        return first + (uniforms * (after - first)).astype(np.int64)


def open_text(moments):
    """CaptionRows of the set of captions beside the Moments. Raises InputError if it does not fit them."""
    place, count = moments.folder.parent / TEXT, len(moments.rows)
    if not place.is_dir():
        raise InputError(f"{place} is missing: the captions' features are read from it; {PREPARE}")
    manifest, rows, owners, _ = open_set(find_set(place, "."))
    spec = manifest and manifest.text
    if spec is None or owners is None or rows.shape != (spec.tokens, spec.width):
        raise InputError(f"{place}: rows have shape {rows.shape}, labels or encoder ({spec}) do not fit; {PREPARE}")
    if not moments.has_images(manifest.images) or manifest.image_count != count:
        raise InputError(f"{place} holds captions of other images than {moments.folder} was made from; {PREPARE}")
    starts = np.searchsorted(owners, np.arange(count + 1))
    if (np.diff(owners) < 0).any() or (np.diff(starts) < 1).any():
        raise InputError(f"{place}: captions are not in the order of the images, or an image has none; {PREPARE}")
    return CaptionRows(rows, starts, Names(place / CAPTIONS, len(rows)), read_empty(place / EMPTY, rows.shape), spec)


def read_empty(path, shape):
    """Features of the empty caption, float32 (L, W). Raises InputError."""
    array = read_floats(path, PREPARE)
    if array.shape != shape:
        raise InputError(f"{path} has shape {array.shape}, the captions {shape}; {PREPARE}")
    return torch.from_numpy(array.astype(np.float32))


@dataclasses.dataclass
class CocoImage:
    id: int | str
    file_name: str


@dataclasses.dataclass
class CocoCaption:
    id: int
    image_id: int | str
    caption: str


@dataclasses.dataclass
class Coco:
    """COCO's JSON of captions."""

    images: list[CocoImage]
    annotations: list[CocoCaption]


def read_annotations(path, flag):
    """{image file name: [caption, …]} of COCO's JSON, or of {file name: caption or list}. Raises InputError."""
    where, remedy = f"{flag} {path}", "give COCO's captions JSON or {file name: [captions]}"
    content = parse_record(Coco | dict[str, str | list[str]], read_bytes(path, remedy), where, remedy)
    captions = content
    if isinstance(content, Coco):
        names = {image.id: image.file_name for image in content.images}
        captions = {name: [] for name in names.values()}
        for annotation in sorted(content.annotations, key=lambda annotation: annotation.id):
            if annotation.image_id not in names:
                raise InputError(f"{where}: 'images' lacks the one of annotation {annotation.id}; restore the file")
            captions[names[annotation.image_id]].append(annotation.caption)
    if not captions:
        raise InputError(f"{where} holds no captions; name another file")
    groups = {name: [group] if isinstance(group, str) else group for name, group in captions.items()}
    return {name: [plain(caption) for caption in group] for name, group in groups.items()}


def plain(caption):
    """A caption on one line, with ? for what UTF-8 cannot hold (half an emoji in JSON)."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())
