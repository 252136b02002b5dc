"""Images of a folder or zip in published order, with their labels, read as RGB.

How odd images are read (docs/data.md says the same): grayscale, CMYK and palette through Pillow's RGB conversion;
alpha is dropped; of animated files the first frame counts; 16-bit samples keep their high byte; EXIF orientation is
ignored, as published. Zero bytes, unknown content, a truncated file and 32-bit samples are unreadable.
"""

import hashlib
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError
from latents.manifest import LABELS_JSON, MANIFEST, DataManifest
from latents.names import NO_LABEL, parse_label_list, walk


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason."""


def is_image_name(name):
    """True if the text after the last dot, lower-cased, is an extension that Pillow knows."""
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


class FolderFiles:
    """The files under a folder."""

    def __init__(self, path):
        self.path = path

    def sizes(self):
        """{relative name: bytes}."""
        return dict(walk(self.path))

    def read(self, name):
        return (self.path / name).read_bytes()

    def reopen(self):
        """Nothing is kept open."""


class ZipFiles:
    """The members of a zip; of equal names the last counts. Threads may read at the same time."""

    def __init__(self, path):
        self.path = path
        self._archive = zipfile.ZipFile(open(path, "rb"))

    def sizes(self):
        return {info.filename: info.file_size for info in self._archive.infolist()}

    def read(self, name):
        """Bytes of a member. Raises BadImageError if it is damaged, encrypted or compressed in an unknown way."""
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
            raise BadImageError(f"unreadable in the zip: {error}") from None

    def reopen(self):
        """Open an own file handle in a forked process: a shared one would share its position."""
        self._archive.fp = open(self.path, "rb")


class ImageSource:
    """Images of a folder or a zip: `names` (sorted), `labels`, `class_names`, `num_classes`, `manifest` or None.

    labels: int64 (N,), NO_LABEL for an image without one; flag: what named the path, for messages.
    """

    def __init__(self, path, published_labels=False, max_images=None, flag="--source"):
        self.path, self.flag = Path(path), flag
        self._files = self._open()
        sizes = self._files.sizes()
        names = sorted(filter(is_image_name, sizes))
        if not names and not published_labels:
            raise InputError(f"{flag} {path} holds no images (files with an extension that Pillow knows)")
        root = {name: self._read_root(name) for name in (MANIFEST, LABELS_JSON) if name in sizes}
        self.manifest = DataManifest.parse(root[MANIFEST], self.path / MANIFEST) if MANIFEST in root else None
        labels, groups = self._label(names, root.get(LABELS_JSON), published_labels)
        recorded = self.manifest.class_names if self.manifest else None
        self.class_names = groups or (list(recorded) if recorded else None)
        self.num_classes = len(groups) if groups else self._count_classes(labels)
        self.names, self.labels = names[:max_images], labels[:max_images]
        self._sizes = [sizes[name] for name in self.names]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image `index` as PIL RGB. Raises BadImageError with the reason."""
        return decode(self._files.read(self.names[index]))

    def read_or_skip(self, index, skip_bad):
        """(image, None), or (None, reason) for an unreadable one if `skip_bad`. Raises InputError otherwise."""
        try:
            return self.read(index), None
        except BadImageError as error:
            if skip_bad:
                return None, str(error)
            raise InputError(f"{self.where(index)} cannot be read ({error}); repair it, or pass --skip-bad") from None

    def where(self, index):
        """Path of image `index`, for messages."""
        return f"{self.path}/{self.names[index]}"

    def reopen(self):
        """Prepare for reading in a forked process."""
        self._files.reopen()

    def fingerprint(self):
        """sha256 of names, sizes and labels: tells whether this is still the same source."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self._sizes, self.labels.tolist(), strict=True):
            text = None if label == NO_LABEL else label
            digest.update(f"{name}\0{size}\0{text}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _open(self):
        if self.path.is_dir():
            return FolderFiles(self.path)
        if self.path.suffix.lower() != ".zip" or not self.path.is_file():
            raise InputError(f"{self.flag} {self.path} is neither a folder nor a .zip file; give one that exists")
        try:
            return ZipFiles(self.path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{self.flag} {self.path} is not a readable zip ({error}); download it again") from None

    def _read_root(self, name):
        try:
            return self._files.read(name)
        except (BadImageError, OSError) as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); restore it, or remove it") from None

    def _label(self, names, listed, published):
        """(labels, class names or None): by dataset.json, whose bytes are `listed`, or by top-level folder."""
        if listed is not None:
            listed_names, listed_labels = parse_label_list(listed, self.path / LABELS_JSON)
            if listed_names:
                label_of = dict(zip(listed_names, listed_labels.tolist(), strict=True))
                return np.array([label_of.get(name, NO_LABEL) for name in names], np.int64), None
            if not published:  # null is what a converted set of one class says: no classes from 00000/ …
                return np.full(len(names), NO_LABEL), None
        return self._label_by_folder(names, published)

    def _label_by_folder(self, names, published):
        """Classes are the sorted top-level folders; a single one gives no labels.

        published: a file in the root is a class '' that sorts first and shifts all others; without it such a file
        beside class folders raises InputError.
        """
        groups = sorted(set(map(class_of, names)))
        if "" in groups and len(groups) > 1 and not published:
            stray = next(name for name in names if class_of(name) == "")
            raise InputError(
                f"{self.path}/{stray} lies beside the class folders and would be a class of its own; move it away, "
                "or pass --published-labels for the labels of the published tool"
            )
        if len(groups) <= 1:
            return np.full(len(names), NO_LABEL), groups if groups != [""] else None
        index = {group: i for i, group in enumerate(groups)}
        return np.array([index[class_of(name)] for name in names], np.int64), groups

    def _count_classes(self, labels):
        """Number of classes as the manifest says, else the largest label + 1; None without labels."""
        known = labels[labels != NO_LABEL]
        if (known < 0).any():
            raise InputError(f"{self.path}/{LABELS_JSON}: labels must be integers from 0")
        recorded = self.manifest and self.manifest.num_classes
        return recorded or (int(known.max()) + 1 if len(known) else None)
