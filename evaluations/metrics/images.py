"""Images to be measured, read in batches with bounded memory: arr_0 of an npz, a folder, or a zip. uint8 throughout."""

import itertools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.errors import InputError, first_line, system_fault
from common.files import regular
from common.look_ahead import ordered_map
from evaluations.metrics.results import sample_labels
from preprocessing.sources import BadImageError, ImageSource

THREADS = 4  # that decode images
# what zipfile and numpy's header parser raise on damaged files
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)
READ_ERRORS += (TypeError, AttributeError)


def open_images(path, flag):
    """NpzImages or FolderImages. Raises InputError naming flag and file."""
    return NpzImages(path, flag) if str(path).endswith(".npz") else FolderImages(path, flag)


def unreadable(path, error):
    damage = f"{path} cannot be read, is truncated or is not an npz ({first_line(error)}); copy or make it again"
    return InputError(system_fault(error, path) or damage)


class NpzImages:
    """Member arr_0, uint8 (N, H, W, 3), streamed from the zip."""

    def __init__(self, path, flag):
        self.path, form = path, np.lib.format
        try:
            self.archive = zipfile.ZipFile(regular(path))
            with self.archive.open("arr_0.npy") as member:
                form.read_magic(member)
                shape, fortran, dtype = form.read_array_header_1_0(member)
                self.start = member.tell()  # of the first pixel
        except KeyError:
            held = self.archive.namelist()
            raise InputError(f"{flag} {path}: missing arr_0 in npz file; it holds {held}") from None
        except READ_ERRORS as error:
            raise unreadable(f"{flag} {path}", error) from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            found = f"{dtype} {shape}{' in Fortran order' if fortran else ''}"
            raise InputError(f"{flag} {path}: arr_0 is {found}; images must be uint8 (N, H, W, 3), in C order")
        self.count, self.shape = shape[0], shape[1:]

    def __len__(self):
        return self.count

    def batches(self, batches):
        """Yield uint8 (B, H, W, 3) for each array of ascending indices, one read ahead. Raises InputError."""
        try:
            with self.archive.open("arr_0.npy") as member:
                yield from ordered_map(lambda indices: self.read_rows(member, indices), batches)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from None

    def read_rows(self, member, indices):
        """Images `indices`, ascending, of the open member."""
        rows = np.empty((len(indices), *self.shape), np.uint8)
        for row, index in zip(rows, indices, strict=True):
            start = self.start + int(index) * row.size
            while member.tell() < start and member.read(min(start - member.tell(), 1 << 20)):
                pass  # a seek would end the checksum's test from Python 3.13 on
            if member.readinto(row) != row.size:
                raise EOFError(f"the data end in image {index} of {self.count}")
        return rows


class FolderImages:
    """Images of a folder (with its subfolders) or a zip, sorted by relative name."""

    def __init__(self, path, flag):
        self.path = path
        self.source = ImageSource(path, published_labels=True, flag=flag)
        if not len(self.source):
            raise InputError(f"{flag} {path} holds no images (files with an extension that Pillow knows)")
        self.shape = self.read(0).shape

    def __len__(self):
        return len(self.source)

    def read(self, index):
        """Image `index`, uint8 (H, W, 3). Raises InputError naming the file."""
        name = self.source.where(index)
        try:
            pixels = np.asarray(self.source.read(index))
        except (BadImageError, OSError) as error:
            fault = f"{name} cannot be read as an image ({error}); replace or remove it"
            raise InputError(system_fault(error, name) or fault) from None
        if pixels.shape != getattr(self, "shape", pixels.shape):
            raise InputError(f"{name} is {pixels.shape}, the first image {self.shape}; all must have one size")
        return pixels

    def batches(self, batches):
        """Yield uint8 (B, H, W, 3) for each of a list of arrays of indices; a whole batch is read ahead."""
        ahead = max(map(len, batches), default=1)
        images = ordered_map(self.read, itertools.chain.from_iterable(batches), ahead, THREADS)
        for indices in batches:
            yield np.stack(list(itertools.islice(images, len(indices))))


def read_samples(flags, path, side, fewest, kind, remedy):
    """(uint8 (N, side, side, 3), labels in the manifest beside them, a `kind` such as list[int]) of generated images.

    flags: CountedSamples; fewest: smallest N. Raises InputError.
    """
    images = open_images(path, "--samples")
    flags.check_count(path, len(images))
    if images.shape != (side, side, 3) or len(images) < fewest:
        found = "{} images of {}x{}".format(len(images), *images.shape[:2])
        raise InputError(f"--samples {path} holds {found}; the judge needs {fewest} or more of {side}x{side}")
    labels = sample_labels(path, kind, len(images), remedy)
    (pixels,) = images.batches([np.arange(len(images))])
    return pixels, labels


def read_split(data, split, side, count=None):
    """(uint8 (N, side, side, 3), labels (N,), class names) of `split`, a folder in a folder or zip. Raises InputError.

    count: at most so many, spaced evenly over the sorted names and so over the classes.
    """
    images = FolderImages(f"{data}{'/' if Path(data).is_dir() else ':'}{split}", "--data")
    if images.shape != (side, side, 3):
        raise InputError(f"--data {images.path} holds images of {images.shape}, not {side}x{side}; convert them first")
    rows = np.linspace(0, len(images), min(count or len(images), len(images)), endpoint=False).astype(int)
    (pixels,) = images.batches([rows])
    return pixels, images.source.labels[rows], images.source.folders
