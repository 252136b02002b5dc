"""Images of a folder or zip in published order, with their labels, read as RGB.

How odd images are read (docs/data.md says the same): grayscale, CMYK and palette through Pillow's RGB conversion;
alpha is dropped; of animated files the first frame counts; 16-bit samples keep their high byte; EXIF orientation is
ignored, as published. Zero bytes, unknown content, a truncated file and 32-bit samples are unreadable.
"""

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import LABELS_JSON, MANIFEST, read_manifest
from models.errors import InputError


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


def label_images(names, listed=None, published=False, where="the source"):
    """(labels, class names or None) of sorted names: labels is a list of int, or None where it has no label.

    listed: {name: label} of the source's dataset.json. Otherwise classes are the sorted top-level folders; a single
    one gives no labels. published: a file in the root is a class '' that sorts first and shifts all others; without it
    such a file beside class folders raises InputError.
    """
    if listed:
        return [listed.get(name) for name in names], None
    groups = sorted({class_of(name) for name in names})
    if "" in groups and len(groups) > 1 and not published:
        stray = next(name for name in names if class_of(name) == "")
        raise InputError(
            f"{where}/{stray} lies beside the class folders and would be a class of its own; move it away, "
            "or pass --published-labels for the labels of the published tool"
        )
    if len(groups) <= 1:
        return [None] * len(names), groups if groups != [""] else None
    index = {group: i for i, group in enumerate(groups)}
    return [index[class_of(name)] for name in names], groups


class ImageSource:
    """Images of a folder or a zip: `names` (sorted), `labels`, `class_names`, `num_classes`, `manifest` or None."""

    def __init__(self, path, published_labels=False, max_images=None):
        self.path = Path(path)
        self._zip = None
        entries = self._list()
        self.manifest = self._read_manifest()
        names = sorted(entries)
        if not names and not published_labels:
            raise InputError(f"--source {path} holds no images (files with an extension that Pillow knows)")
        labels, groups = self._label(names, published_labels)
        self.class_names = groups or (self.manifest or {}).get("class_names")
        self.num_classes = self._count_classes(labels, groups)
        self.names, self.labels = names[:max_images], labels[:max_images]
        self._sizes = [entries[name] for name in self.names]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image `index` as PIL RGB. Raises BadImageError with the reason."""
        return decode(self._read(self.names[index]))

    def reopen(self):
        """Own file handle for a forked process: a shared one shares its position."""
        if self._zip is not None:
            self._zip.fp = open(self.path, "rb")

    def fingerprint(self):
        """sha256 of names, sizes and labels: tells whether this is still the same source."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self._sizes, self.labels, strict=True):
            digest.update(f"{name}\0{size}\0{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _list(self):
        """{relative name: bytes} of every image."""
        if self.path.is_dir():
            return {name: size for name, size in walk(self.path) if is_image_name(name)}
        if self.path.suffix.lower() == ".zip" and self.path.is_file():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise InputError(f"--source {self.path} is no readable zip ({error}); download it again") from None
            members = (info for info in self._zip.infolist() if not info.is_dir())
            return {info.filename: info.file_size for info in members if is_image_name(info.filename)}
        raise InputError(f"--source {self.path} is neither a folder nor a .zip file; give one that exists")

    def _read(self, name):
        if self._zip is None:
            return (self.path / name).read_bytes()
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise BadImageError(f"damaged in the zip: {error}") from None

    def _read_text(self, name):
        """Bytes of a file in the root, or None."""
        if self._zip is not None:
            return self._zip.read(name) if name in self._zip.namelist() else None
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def _read_manifest(self):
        if self._zip is None:
            return read_manifest(self.path)
        text = self._read_text(MANIFEST)
        return json.loads(text) if text else None

    def _label(self, names, published):
        text = self._read_text(LABELS_JSON)
        if text is None:
            return label_images(names, None, published, self.path)
        try:
            pairs = json.loads(text)["labels"]
            listed = dict(pairs or [])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}/{LABELS_JSON} does not hold 'labels': [[name, integer], …]") from None
        if not listed and not published:  # null is what a converted set of one class says: no classes from 00000/ …
            return [None] * len(names), None
        return label_images(names, listed, published, self.path)

    def _count_classes(self, labels, groups):
        if groups:
            return len(groups)
        recorded = (self.manifest or {}).get("num_classes")
        numbers = [label for label in labels if label is not None]
        if any(type(label) is not int or label < 0 for label in numbers):
            raise InputError(f"{self.path}/{LABELS_JSON}: labels must be integers from 0")
        return recorded or (max(numbers) + 1 if numbers else None)


def walk(folder, ancestors=()):
    """(relative name with `/`, bytes) of every file, following links; a link back to a parent is not followed."""
    here = os.path.realpath(folder)
    if here in ancestors:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                for name, size in walk(entry.path, (*ancestors, here)):
                    yield f"{entry.name}/{name}", size
            elif entry.is_file():
                yield entry.name, entry.stat().st_size
