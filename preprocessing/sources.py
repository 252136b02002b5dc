"""Images of a folder or zip in published order, with their labels, read as RGB; for unusual ones see docs/data.md."""

import errno
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError, first_line, note, system_fault
from latents.manifest import FORMAT, IMAGES, LABELS_JSON, MANIFEST, MOMENTS, NAMES, DataManifest
from latents.names import (
    NO_LABEL,
    Names,
    check_names,
    class_of,
    fingerprint,
    is_data,
    label_by_folder,
    parse_label_list,
    walk,
)
from latents.rows import BadImageError, to_rgb
from latents.sets import check_finished

LARGEST = 1 << 30  # bytes of an image file
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)  # not the fault of one image


def is_image_name(name):
    """True for a name with an extension that Pillow knows."""
    return os.path.splitext(name)[1].lower() in Image.registered_extensions()


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
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
        raise BadImageError(first_line(error)) from None


class ImageSource:
    """Images of a folder or a zip, sorted by name; labels: int64 (N,), NO_LABEL for an image without one.

    path: FOLDER, FILE.zip, or FILE.zip:FOLDER for a folder in a zip; count: of all images, beyond max_images too.
    """

    def __init__(self, path, published_labels=False, max_images=None, flag="--source"):
        self.path = self._file = Path(path)
        if self.path.is_dir():
            check_finished(self.path)
            self._zip, versions = None, dict(walk(self.path))
        else:
            versions = self._open_zip(flag)
        names = sorted(filter(is_image_name, versions))
        if not names and any(name.endswith(".npy") for name in versions):
            remedy = f"unpack a zip of latents into DATA/{MOMENTS}, then train on DATA, or `pack` it"
            raise InputError(f"{flag} {path} holds arrays (.npy), not images; {remedy}")
        if not names and not published_labels:
            raise InputError(f"{flag} {path} holds no images (by extensions that Pillow knows); unpack tar files first")
        check_names(names)
        inner = f"{IMAGES}/{MANIFEST}"
        if MANIFEST not in versions and inner in versions and FORMAT.encode() in self._read_root(inner):
            raise InputError(f"{flag} {path} is a data folder; pass its images instead: {self.path / IMAGES}")
        root = {name: self._read_root(name) for name in (MANIFEST, LABELS_JSON) if name in versions}
        self.manifest = None
        if FORMAT.encode() in root.get(MANIFEST, b""):  # other tools write a file of that name too
            self.manifest = DataManifest.parse(root[MANIFEST], self.path / MANIFEST)
        self._has_origins = self.manifest is not None and NAMES in versions
        labels, self.folders = self._label(names, root.get(LABELS_JSON), published_labels)
        self.class_names, self.num_classes = self.folders, len(self.folders or ())
        if self.manifest and not self.folders:
            self.class_names = list(self.manifest.class_names or ()) or None
            self.num_classes = self.manifest.num_classes
        self.num_classes = self.num_classes or int(labels.max(initial=-1)) + 1 or None
        self.count, self.names, self.labels = len(names), names[:max_images], labels[:max_images]
        self._versions = [versions[name] for name in self.names]  # (bytes, time of change or checksum)

    def __len__(self):
        return len(self.names)

    def origins(self):
        """Names of the images before convert, with folders; their present names if convert did not make them."""
        if not self._has_origins:
            return self.names
        content = None if self._zip is None else self._read_root(NAMES)
        return Names(self.path / NAMES, self.manifest.count, content)

    def read(self, index):
        """Image `index` as PIL RGB. Raises BadImageError with the reason."""
        if self._versions[index][0] > LARGEST:
            raise BadImageError(f"more than {LARGEST} bytes are no image")
        return decode(self._read(self.names[index]))

    def first_width(self, skip_bad):
        """Width of the first image that can be read, None where there is none; errors as read_or_skip."""
        images = (self.read_or_skip(index, skip_bad)[0] for index in range(len(self)))
        return next((image.width for image in images if image), None)

    def read_or_skip(self, index, skip_bad, transform=None):
        """(image, None), or (None, reason) for an unreadable one if `skip_bad`. Raises InputError otherwise.

        transform: applied to the image; may raise BadImageError or return None.
        """
        try:
            image = self.read(index)
            return transform(image) if transform else image, None
        except BadImageError as error:
            if skip_bad:
                return None, str(error)
            raise InputError(
                f"{self.where(index)} cannot be read ({error}); repair it, or run convert with --skip-bad"
            ) from None

    def where(self, index):
        """Path of image `index`, for messages."""
        return f"{self.path}/{self.names[index]}"

    def reopen(self):
        """Prepare for reading in a forked process: a shared file handle would share its position."""
        if self._zip is not None:
            self._zip.fp = open(self._file, "rb")

    def fingerprint(self):
        """sha256 of names, sizes and labels: tells whether this is still the same source."""
        return self._digest(range(len(self)), [size for size, _ in self._versions])

    def made_from(self, batch_size):
        """For Job; the digest covers names, labels, sizes and modification times."""
        return self.names, batch_size, lambda batch: self._digest(batch, self._versions[batch.start : batch.stop])

    def _digest(self, indices, versions):
        part = slice(indices.start, indices.stop)
        return fingerprint(self.names[part], versions, self.labels[part].tolist())

    def classes(self, kept, unreadable):
        """(labels of the images `kept`, class names, number of classes).

        A folder whose images are all among the names `unreadable` is no class.
        """
        labels = self.labels[kept]
        if self.folders is None:
            return labels, self.class_names, self.num_classes
        gone = np.setdiff1d(self.labels, self.labels[[name not in unreadable for name in self.names]])
        for number in gone.tolist():
            note(f"{self.path}/{self.folders[number]} has no readable image, so it is no class")
        names = [name for number, name in enumerate(self.folders) if number not in gone]
        return np.where(labels == NO_LABEL, labels, labels - np.searchsorted(gone, labels)), names, len(names)

    def _open_zip(self, flag):
        """Open the zip and return {name: (bytes, checksum)} of the data files in the chosen folder."""
        inside = ""
        if not self.path.exists() and (match := re.fullmatch(r"(.+\.zip):(.+)", str(self.path), re.IGNORECASE)):
            self._file, inside = Path(match[1]), match[2].strip("/") + "/"
        if self._file.suffix.lower() != ".zip" or not self._file.is_file():
            raise InputError(
                f"{flag} {self._file} is neither a folder nor a .zip; give one that exists, and unpack tar files first"
            )
        try:
            self._zip = zipfile.ZipFile(open(self._file, "rb"))
        except Exception as error:  # zipfile raises nearly everything on damaged directories
            fault = f"{self._file} is not a readable zip ({first_line(error)}); download it again"
            raise InputError(f"{flag} {system_fault(error, self._file) or fault}") from None
        self._members = {}  # if a name occurs twice, the last counts
        for info in self._zip.infolist():
            name = info.filename.replace("\\", "/").removeprefix("./").lstrip("/")  # as some tools write them
            if name.startswith(inside) and is_data(name := name.removeprefix(inside)):
                self._members[name] = info
        return {name: (info.file_size, info.CRC) for name, info in self._members.items()}

    def _read(self, name):
        """Bytes of a file; threads may call it concurrently. Raises BadImageError if it cannot be read."""
        try:
            return (self.path / name).read_bytes() if self._zip is None else self._zip.read(self._members[name])
        except Exception as error:  # zipfile and its decompressors raise nearly everything on damaged members
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in OF_THE_MACHINE:
                raise
            where = "" if self._zip is None else "unreadable in the zip: "
            raise BadImageError(where + (getattr(error, "strerror", None) or first_line(error))) from None

    def _read_root(self, name):
        try:
            return self._read(name)
        except BadImageError as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); restore it, or move it away") from None

    def _label(self, names, listed, published):
        """(labels, class names or None): by dataset.json, whose bytes are `listed`, or by sorted top-level folder.

        A single folder gives no labels. published: a file in the root is a class '' that sorts first.
        """
        if listed is not None:
            where = self.path / LABELS_JSON
            listed_names, listed_labels = parse_label_list(listed, where)
            if listed_names:
                label_of = dict(zip(listed_names, listed_labels.tolist(), strict=True))
                labels = np.array([label_of.pop(name, NO_LABEL) for name in names], np.int64)
                if ((labels < 0) & (labels != NO_LABEL)).any():
                    raise InputError(f"{where}: labels must be integers from 0; correct it")
                lone = [names[i] for i in np.flatnonzero(labels == NO_LABEL)]
                for kind, found in (("images without a label", lone), ("labels without an image", list(label_of))):
                    if found:
                        note(f"warning: {where}: {len(found)} {kind}, the first is {found[0]}")
                return labels, None
            if not published:  # null is what a converted set of one class says: no classes 00000/ …
                return np.full(len(names), NO_LABEL), None
        labels, folders = label_by_folder(names)
        if "" in (folders or ()) and not published:
            stray = next(name for name in names if class_of(name) == "")
            raise InputError(f"{self.path}/{stray} lies beside the class folders; move it, or pass --published-labels")
        return labels, folders
