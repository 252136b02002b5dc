"""Captions: the set `text` of a data folder, whose rows are features of captions, and the JSON files they come from.

The set is packed. Its labels are the numbers of the images, and beside the rows lie the captions' texts and the
features of the empty caption.

Letters: N images, M captions, L tokens, W width of the features.
"""

import collections
import dataclasses

import numpy as np
import torch

from common.errors import InputError
from common.files import read_json
from latents.manifest import MANIFEST
from latents.names import Names
from latents.sets import find_set, open_set

TEXT = "text"
CAPTIONS = "captions.txt"  # the captions, lines padded to one width as those of names.txt
EMPTY = "empty.npy"  # features of the empty caption
PREPARE = "make it with preprocessing/dataset_tools.py captions"


@dataclasses.dataclass(frozen=True)
class CaptionRows:
    """Features of captions: rows (M, L, W), starts (N + 1,), image i has the rows starts[i] … starts[i + 1] − 1.

    captions: their texts; empty: float32 (L, W), of the empty caption.
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
        return [self.captions[int(row)] for row in rows]


def open_text(place, pairing):
    """(CaptionRows, TextSpec) of the set of captions in the folder `place`. Raises InputError where it does not fit.

    pairing: the Pairing of the moments.
    """
    manifest, rows, owners, _ = open_set(find_set(place, "."))
    if manifest is None or manifest.text is None:
        raise InputError(f"{place / MANIFEST} does not say which text encoder made the features; {PREPARE}")
    spec = manifest.text
    if rows.shape != (spec.tokens, spec.width):
        raise InputError(
            f"{place}: rows have shape {rows.shape}, its text encoder gives {(spec.tokens, spec.width)}; {PREPARE}"
        )
    if pairing.images not in (None, manifest.images) or manifest.image_count != pairing.count:
        raise InputError(
            f"{place} holds captions of other images than {pairing.folder} was made from ({manifest.image_count} and "
            f"{pairing.count}); {PREPARE}, of the same images"
        )
    if owners is None:
        raise InputError(f"{place} does not say whose captions it holds; {PREPARE}")
    starts = np.searchsorted(owners, np.arange(pairing.count + 1))
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
