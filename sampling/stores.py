"""What sampling leaves on disk: PNG files or the rows of an npz, written in threads, resumable, never half written.

A store keeps finished rows by image index: `PngFiles` as FOLDER/000000.png …, `PartFiles` (npz without PNGs, and
latents) as one file per batch, deleted once the npz is there. `pack` streams the rows of either into an npz.
"""

import functools
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError, note, system_error, system_fault
from common.files import write_atomically, write_json
from common.look_ahead import ordered_map
from latents.names import walk
from sampling.manifest import SETTINGS, check_settings

GENEVAL_IMAGES = 4  # of each prompt
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
REMEDY = "delete it and run the same again"


class PngFiles:
    """uint8 images (R, R, 3) as FOLDER/000000.png …"""

    name = "arr_0"  # ADM's name of the array in the npz
    kind = "png"
    pattern = "[0-9][0-9][0-9][0-9][0-9][0-9]*.png"

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, index):
        return self.folder / f"{index:06d}.png"

    def missing(self, count):
        """Indices below `count` without a whole image; one that was cut off, as by a power cut, does not count."""
        # listed first: asking a network file system for what is not there yet may be answered from its cache later
        there, paths = set(self.folder.glob(self.pattern)), map(self.path, range(count))
        return [index for index, path in enumerate(paths) if path not in there or not ends_as_png(path)]

    def write(self, indices, images):
        """Save the images that are not there yet; each is complete or absent."""
        for path, pixels in zip(map(self.path, indices), images, strict=True):
            if not ends_as_png(path):
                save = functools.partial(Image.fromarray(pixels).save, format="PNG", compress_level=1)
                write_atomically(path, save, durable=False)

    def read(self, index):
        """Pixels of an image. Raises InputError where it cannot be decoded."""
        try:
            with Image.open(self.path(index)) as picture:
                return np.asarray(picture)
        except (OSError, SyntaxError, ValueError) as error:
            fault = system_fault(error, self.path(index)) or f"{self.path(index)} is damaged ({error}); {REMEDY}"
            raise InputError(fault) from None

    def rows(self, count):
        """Yield the images 0 … count − 1, decoded by several threads, few of them in memory."""
        return ordered_map(self.read, range(count), ahead=32, threads=16)

    def finish(self, count):
        """Delete images beyond the first `count`, of an earlier run that made more: the folder may be measured too."""
        wanted = set(map(self.path, range(count)))
        surplus = [path for path in self.folder.glob(self.pattern) if path.stem.isdigit() and path not in wanted]
        for path in surplus:
            path.unlink()
        if surplus:
            note(f"deleted {len(surplus)} images beyond --num-fid-samples {count} in {self.folder}")


class GenEvalFiles(PngFiles):
    """GenEval's layout: FOLDER/00000/samples/0000.png … and FOLDER/00000/metadata.jsonl, one folder per prompt.

    metadata: its record of each prompt; per_prompt: images of each.
    """

    kind = "geneval"
    pattern = "[0-9]*/samples/[0-9][0-9][0-9][0-9]*.png"

    def __init__(self, folder, metadata, per_prompt):
        super().__init__(folder)
        self.metadata, self.per_prompt = metadata, per_prompt

    def path(self, index):
        prompt, number = divmod(index, self.per_prompt)
        return self.folder / f"{prompt:05d}" / "samples" / f"{number:04d}.png"

    def finish(self, count):
        """As PngFiles.finish; then say in every prompt's folder what its images show."""
        super().finish(count)
        for index, record in zip(range(0, count, self.per_prompt), self.metadata, strict=False):
            path, line = self.path(index).parents[1] / "metadata.jsonl", json.dumps(record) + "\n"
            write_atomically(path, lambda file, line=line: file.write(line.encode()), durable=False)


def ends_as_png(path):
    """True where a file is there and its end is that of a PNG."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError as error:
        if system_error(error):
            raise
        return False


class PartFiles:
    """Rows of an npz as one .npy per batch, FOLDER/rows-START-STOP.npy; name: that of the npz's array."""

    kind = "parts"

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name

    def parts(self):
        """[(start, stop, path)] of the finished batches."""
        paths = sorted(self.folder.glob("rows-*-*.npy"))
        return [(*map(int, path.stem.split("-")[1:]), path) for path in paths]

    def missing(self, count):
        """Indices below `count` that no part holds."""
        return sorted(set(range(count)).difference(*(range(start, stop) for start, stop, _ in self.parts())))

    def write(self, indices, rows):
        """Save a batch of consecutive images, complete or absent."""
        path = self.folder / f"rows-{indices[0]:08d}-{indices[-1] + 1:08d}.npy"
        write_atomically(path, lambda file: np.save(file, rows))

    def rows(self, count):
        """Yield the rows 0 … count − 1, one part in memory at a time."""
        index, parts = 0, self.parts()
        while index < count:
            start, stop, path = next(part for part in parts if part[0] <= index < part[1])
            try:
                part = np.load(path)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(system_fault(error, path) or f"{path} is damaged ({error}); {REMEDY}") from None
            yield from part[index - start : count - start]
            index = stop

    def finish(self, _count):
        """Delete the parts: the npz has their rows."""
        for _, _, path in self.parts():
            path.unlink()


def write_npz(path, name, rows, count):
    """Stream `count` arrays of one shape and dtype into array `name`, (count, …), of an npz; complete or absent.

    Raises InputError where shapes differ.
    """
    rows = iter(rows)
    first = next(rows)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape)}
    member = zipfile.ZipInfo(f"{name}.npy")  # has a fixed date: the same samples give the same bytes

    def write(file):
        with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index, row in zip(range(count), itertools.chain([first], rows), strict=True):
                if (row.shape, row.dtype) != (first.shape, first.dtype):
                    raise InputError(
                        f"{path}: image {index} is {row.shape} {row.dtype}, not {first.shape} {first.dtype}; {REMEDY}"
                    )
                array.write(row.tobytes())

    write_atomically(path, write)


def pack(store, target, count):
    """Pack a store's rows into the npz `target`, unless target is None; exactly `count`, checked. Raises InputError."""
    if missing := store.missing(count):
        lacks = f"{len(missing)} of {count} images are missing, the first is {missing[0]}"
        raise InputError(f"{store.folder}: {lacks}; run the same again")
    if target is not None:
        write_npz(target, store.name, store.rows(count), count)


def prepare_folder(folder, settings, resume=True):
    """Make the folder of a result, or check its settings and delete what killed processes left half-written.

    settings: of a SampleManifest; resume False refuses a folder with finished images. Raises InputError.
    """
    record = folder / SETTINGS
    has_images = folder.is_dir() and any(name.endswith((".png", ".npy")) for name, _ in walk(folder))
    if has_images and not record.exists():
        raise InputError(f"{folder} holds images of unknown settings (no {SETTINGS}); pass another --sample-dir")
    if not resume and (has_images or Path(f"{folder}.npz").exists()):
        raise InputError(f"{folder} holds finished images; resume with --resume, or pass another --sample-dir")
    if record.exists():
        check_settings(folder, settings)
    for path in [*folder.rglob(".*.tmp"), *folder.parent.glob(f".{folder.name}.npz.*.tmp")]:
        path.unlink(missing_ok=True)
    write_json(record, settings)
