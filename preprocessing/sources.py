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
    """True for a name with an extension that Pillow knows."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return dot + extension.lower() in Image.registered_extensions()


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
    except Image.UnidentifiedImageError:
        raise BadImageError("no image format that Pillow knows") from None
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise BadImageError(str(error).replace("\n", " ") or type(error).__name__) from None


def class_of(name):
    """Top-level folder of a relative name; '' for a file in the root."""
    return name.split("/", 1)[0] if "/" in name else ""


class ImageSource:
    """Images of a folder or a zip, sorted by name; labels: int64 (N,), NO_LABEL for an image without one."""

    def __init__(self, path, published_labels=False, max_images=None, flag="--source"):
        self.path = Path(path)
        self._zip = None if self.path.is_dir() else self._open_zip(flag)
        entries = walk(self.path) if self._zip is None else ((i.filename, i.file_size) for i in self._zip.infolist())
        sizes = dict(entries)  # of equal names in a zip the last counts
        names = sorted(filter(is_image_name, sizes))
        if not names and not published_labels:
            raise InputError(f"{flag} {path} holds no images (files with an extension that Pillow knows)")
        root = {name: self._read_root(name) for name in (MANIFEST, LABELS_JSON) if name in sizes}
        self.manifest = DataManifest.parse(root[MANIFEST], self.path / MANIFEST) if MANIFEST in root else None
        labels, self.class_names = self._label(names, root.get(LABELS_JSON), published_labels)
        self.num_classes = len(self.class_names or ())
        if self.manifest and not self.class_names:
            self.class_names = list(self.manifest.class_names or ()) or None
            self.num_classes = self.manifest.num_classes
        self.num_classes = self.num_classes or int(labels.max(initial=-1)) + 1 or None
        self.names, self.labels = names[:max_images], labels[:max_images]
        self._sizes = [sizes[name] for name in self.names]

    def __len__(self):
        return len(self.names)

    def read(self, index):
        """Image `index` as PIL RGB. Raises BadImageError with the reason."""
        return decode(self._read(self.names[index]))

    def first_width(self, skip_bad):
        """Width of the first image that can be read, None where there is none; errors as read_or_skip."""
        images = (self.read_or_skip(index, skip_bad)[0] for index in range(len(self)))
        return next((image.width for image in images if image), None)

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
        """Prepare for reading in a forked process: a shared file handle would share its position."""
        if self._zip is not None:
            self._zip.fp = open(self.path, "rb")

    def fingerprint(self):
        """sha256 of names, sizes and labels: tells whether this is still the same source."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self._sizes, self.labels.tolist(), strict=True):
            text = None if label == NO_LABEL else label
            digest.update(f"{name}\0{size}\0{text}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _open_zip(self, flag):
        if self.path.suffix.lower() != ".zip" or not self.path.is_file():
            raise InputError(f"{flag} {self.path} is neither a folder nor a .zip file; give one that exists")
        try:
            return zipfile.ZipFile(open(self.path, "rb"))
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{flag} {self.path} is not a readable zip ({error}); download it again") from None

    def _read(self, name):
        """Bytes of a file; threads may read at the same time. Raises BadImageError for a damaged member of a zip."""
        if self._zip is None:
            return (self.path / name).read_bytes()
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:  # also encrypted, unknown compression
            raise BadImageError(f"unreadable in the zip: {error}") from None

    def _read_root(self, name):
        try:
            return self._read(name)
        except (BadImageError, OSError) as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); restore it, or remove it") from None

    def _label(self, names, listed, published):
        """(labels, class names or None): by dataset.json, whose bytes are `listed`, or by sorted top-level folder.

        A single folder gives no labels. published: a file in the root is a class '' that sorts first.
        """
        if listed is not None:
            listed_names, listed_labels = parse_label_list(listed, self.path / LABELS_JSON)
            if listed_names:
                label_of = dict(zip(listed_names, listed_labels.tolist(), strict=True))
                labels = np.array([label_of.get(name, NO_LABEL) for name in names], np.int64)
                if ((labels < 0) & (labels != NO_LABEL)).any():
                    raise InputError(f"{self.path}/{LABELS_JSON}: labels must be integers from 0; correct it")
                return labels, None
            if not published:  # null is what a converted set of one class says: no classes 00000/ …
                return np.full(len(names), NO_LABEL), None
        groups = sorted(set(map(class_of, names)))
        if "" in groups and len(groups) > 1 and not published:
            stray = next(name for name in names if class_of(name) == "")
            raise InputError(f"{self.path}/{stray} lies beside the class folders; move it, or pass --published-labels")
        if len(groups) <= 1:
            return np.full(len(names), NO_LABEL), None if groups in ([], [""]) else groups
        index = {group: i for i, group in enumerate(groups)}
        return np.array([index[class_of(name)] for name in names], np.int64), groups
