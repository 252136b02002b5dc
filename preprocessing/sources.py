"""Images of a folder or zip in published order, with their labels, read as RGB.

How odd images are read (docs/data.md says the same): grayscale, CMYK and palette through Pillow's RGB conversion;
alpha is dropped; of animated files the first frame counts; 16-bit samples keep their high byte; EXIF orientation is
ignored, as published. Zero bytes, unknown content, a truncated file and 32-bit samples are unreadable.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError
from latents.manifest import LABELS_JSON, MANIFEST, read_manifest
from listing import NO_LABEL, NameTable, integers_on_disk, read_labels, walk
from preprocessing.zips import ZipReader

WRONG = -1  # in place of a label that is no integer from 0


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason."""


def is_image_name(name):
    """True where the text after the last dot, lower-cased, is an extension that Pillow knows."""
    Image.init()
    base = name.rsplit("/", 1)[-1]
    return "." in base and "." + base.rsplit(".", 1)[1].lower() in Image.EXTENSION


def to_rgb(image):
    """A PIL image as RGB, published treatment. Raises BadImageError for samples without an 8-bit meaning."""
    deep_png = image.mode == "I" and image.format == "PNG"
    if image.mode.startswith("I;16") or deep_png:  # Pillow's own conversion would clip everything above 255 to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError("32-bit samples have no stated range")
    return image.convert("RGB")


def decode(data):
    """Bytes of an image file → PIL RGB image. Raises BadImageError with the reason."""
    if not data:
        raise BadImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        reason = str(error).replace("\n", " ")
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image format that Pillow knows"
        raise BadImageError(reason or type(error).__name__) from None


def class_of(name):
    """Top-level folder of a relative name; '' for a file in the root."""
    return name.split("/", 1)[0] if "/" in name else ""


class ImageSource:
    """Images of a folder or a zip: `names` (sorted), `labels`, `class_names`, `num_classes`, `manifest` or None.

    labels: int64 (N,), NO_LABEL where an image has none. Names and labels are on disk: memory does not grow with N.
    """

    def __init__(self, path, published_labels=False, max_images=None, flag="--source"):
        self.path, self.flag = Path(path), flag
        self._zip, self._root_files = None, {}
        self.names = self._list()
        self.manifest = self._read_manifest()
        if not self.names and not published_labels:
            raise InputError(f"{flag} {path} holds no images (files with an extension that Pillow knows)")
        self.labels = integers_on_disk(len(self.names))
        groups = self._label(published_labels)
        self.class_names = groups or (self.manifest or {}).get("class_names")
        self.num_classes = self._count_classes(groups)
        self.names.cut(max_images)
        self.labels = self.labels[:max_images]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image `index` as PIL RGB. Raises BadImageError with the reason."""
        return decode(self._read(index))

    def reopen(self):
        """Own file handle for a forked process: a shared one shares its position."""
        if self._zip is not None:
            self._zip.reopen()

    def fingerprint(self):
        """sha256 of names, sizes and labels: tells whether this is still the same source."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self.names.column(0), self.labels, strict=True):
            text = None if label == NO_LABEL else label
            digest.update(f"{name}\0{size}\0{text}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _list(self):
        """Table of relative names with their bytes; of a zip also where its directory has them."""
        if self.path.is_dir():
            return NameTable(((name, size) for name, size in walk(self.path) if is_image_name(name)), columns=1)
        if self.path.suffix.lower() == ".zip" and self.path.is_file():
            try:
                self._zip = ZipReader(self.path)
                return NameTable(self._list_zip(), columns=2, unique=True)
            except zipfile.BadZipFile as error:
                raise InputError(f"{self.flag} {self.path} is no readable zip ({error}); download it again") from None
        raise InputError(f"{self.flag} {self.path} is neither a folder nor a .zip file; give one that exists")

    def _list_zip(self):
        for name, size, position in self._zip.entries():
            if name in (MANIFEST, LABELS_JSON):
                self._root_files[name] = position
            elif is_image_name(name):
                yield name, size, position

    def _read(self, index):
        if self._zip is None:
            return (self.path / self.names[index]).read_bytes()
        try:
            return self._zip.read(self.names.column(1)[index])
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise BadImageError(f"damaged in the zip: {error}") from None

    def _open(self, name):
        """Binary file in the root, or None."""
        if self._zip is not None:
            return self._zip.open(self._root_files[name]) if name in self._root_files else None
        path = self.path / name
        return open(path, "rb") if path.is_file() else None

    def _read_manifest(self):
        if self._zip is None:
            return read_manifest(self.path)
        file = self._open(MANIFEST)
        with file or contextlib.nullcontext():
            return json.load(file) if file else None

    def _label(self, published):
        """Fill `labels`; returns the class names, or None where they are not known."""
        file = self._open(LABELS_JSON)
        if file is None:
            return self._label_by_folder(published)
        with file:
            try:
                pairs = read_labels(file)
                listed = NameTable(map(_listed_label, pairs or ()), columns=1, unique=True)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}/{LABELS_JSON} does not hold 'labels': [[name, integer], …]") from None
        if listed:
            return self._label_by_list(listed)
        if published:
            return self._label_by_folder(published)
        self.labels[:] = NO_LABEL  # null is what a converted set of one class says: no classes from 00000/ …
        return None

    def _label_by_list(self, listed):
        """Labels of the source's dataset.json, where it has the image."""
        numbers = listed.column(0)
        for k, name in enumerate(self.names):
            found = listed.find(name)
            self.labels[k] = NO_LABEL if found is None else numbers[found]

    def _label_by_folder(self, published):
        """Classes are the sorted top-level folders; a single one gives no labels.

        published: a file in the root is a class '' that sorts first and shifts all others; without it such a file
        beside class folders raises InputError.
        """
        groups = sorted(set(map(class_of, self.names)))
        if "" in groups and len(groups) > 1 and not published:
            stray = next(name for name in self.names if class_of(name) == "")
            raise InputError(
                f"{self.path}/{stray} lies beside the class folders and would be a class of its own; move it away, "
                "or pass --published-labels for the labels of the published tool"
            )
        if len(groups) <= 1:
            self.labels[:] = NO_LABEL
            return groups if groups != [""] else None
        index = {group: i for i, group in enumerate(groups)}
        for k, name in enumerate(self.names):
            self.labels[k] = index[class_of(name)]
        return groups

    def _count_classes(self, groups):
        if groups:
            return len(groups)
        recorded = (self.manifest or {}).get("num_classes")
        if (self.labels == WRONG).any():
            raise InputError(f"{self.path}/{LABELS_JSON}: labels must be integers from 0")
        largest = int(self.labels.max(initial=NO_LABEL))
        return recorded or (None if largest == NO_LABEL else largest + 1)


def _listed_label(pair):
    """(name, label) of an entry of dataset.json; null is NO_LABEL, and what cannot be a label is WRONG."""
    name, label = pair
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no file name")
    if label is None:
        return name, NO_LABEL
    return name, label if type(label) is int and 0 <= label < -NO_LABEL else WRONG
