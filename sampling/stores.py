"""What sampling leaves on disk: PNG files or the rows of an npz, written in threads, resumable, never half written.

A store keeps finished rows by image index: `PngFiles` as FOLDER/000000.png …, `PartFiles` (npz without PNGs, and
latents) as one file per batch, deleted once the npz is there. `write_npz` streams the rows of either.
"""

import itertools
import json
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError, note
from common.files import named_full_disk, write_atomically, write_json
from common.look_ahead import ordered_map
from sampling.manifest import SETTINGS, check_settings

GENEVAL_IMAGES = 4  # of each prompt
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG


class PngFiles:
    """uint8 images (R, R, 3) as FOLDER/000000.png …"""

    name = "arr_0"  # ADM's name of the array in the npz
    kind = "png"

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, index):
        return self.folder / f"{index:06d}.png"

    def missing(self, count):
        """Indices below `count` without a whole image; one that was cut off, as by a power cut, does not count."""
        # listed first: asking a network file system for what is not there yet may be answered from its cache later
        there = {path.name for path in self.folder.iterdir()}
        paths = map(self.path, range(count))
        return [index for index, path in enumerate(paths) if path.name not in there or not ends_as_png(path)]

    def write(self, indices, images):
        """Save the images that are not there yet; each is complete or absent. Raises InputError on a full disk."""
        for index, pixels in zip(indices, images, strict=True):
            if not ends_as_png(self.path(index)):
                picture = Image.fromarray(pixels)
                with named_full_disk(self.path(index)):
                    write_atomically(
                        self.path(index), lambda f, p=picture: p.save(f, "PNG", compress_level=1), durable=False
                    )

    def read(self, index):
        """Pixels of an image. Raises InputError where it cannot be decoded."""
        try:
            with Image.open(self.path(index)) as picture:
                return np.asarray(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{self.path(index)} is damaged ({error}); delete it and run the same again") from None

    def rows(self, count):
        """Yield the images 0 … count − 1, decoded by several threads, few of them in memory."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, count, 64):
                yield from pool.map(self.read, range(start, min(start + 64, count)))

    def trim(self, count):
        """Delete images beyond the first `count`, of an earlier run that made more: the folder may be measured too."""
        surplus = [p for p in self.folder.glob("*.png") if p.stem.isdigit() and int(p.stem) >= count]
        for path in surplus:
            path.unlink()
        if surplus:
            note(f"deleted {len(surplus)} images beyond --num-fid-samples {count} in {self.folder}")

    def clear(self):
        """PNGs stay."""


class GenEvalFiles(PngFiles):
    """GenEval's layout: FOLDER/00000/samples/0000.png … and FOLDER/00000/metadata.jsonl, one folder per prompt.

    metadata: its record of each prompt; per_prompt: images of each.
    """

    kind = "geneval"

    def __init__(self, folder, metadata, per_prompt):
        super().__init__(folder)
        self.metadata, self.per_prompt = metadata, per_prompt

    def path(self, index):
        prompt, number = divmod(index, self.per_prompt)
        return self.folder / f"{prompt:05d}" / "samples" / f"{number:04d}.png"

    def record(self, index):
        """The file that says what image `index` shows."""
        return self.path(index).parents[1] / "metadata.jsonl"

    def missing(self, count):
        """Indices below `count` without a whole image or a record."""
        return [i for i in range(count) if not (ends_as_png(self.path(i)) and self.record(i).is_file())]

    def write(self, indices, images):
        """As PngFiles.write; a prompt's record is written with its first image."""
        for index in indices:
            if index % self.per_prompt == 0:
                line = json.dumps(self.metadata[index // self.per_prompt]) + "\n"
                with named_full_disk(self.folder):
                    write_atomically(self.record(index), lambda f, text=line: f.write(text.encode()))
        super().write(indices, images)

    def trim(self, count):
        """Delete images beyond the first `count`."""
        for index in range(count, len(self.metadata) * self.per_prompt):
            self.path(index).unlink(missing_ok=True)


def ends_as_png(path):
    """True where a file is there and its end is that of a PNG."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:
        return False


class PartFiles:
    """Rows of an npz as one .npy per batch, FOLDER/rows-START-STOP.npy; name: that of the npz's array."""

    kind = "parts"

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name

    def parts(self):
        """[(start, stop, path)] of the finished batches."""
        found = [(re.fullmatch(r"rows-(\d+)-(\d+)\.npy", path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)

    def missing(self, count):
        """Indices below `count` that no part holds."""
        have = set(itertools.chain.from_iterable(range(start, stop) for start, stop, _ in self.parts()))
        return [index for index in range(count) if index not in have]

    def write(self, indices, rows):
        """Save a batch of consecutive images, complete or absent. Raises InputError on a full disk."""
        path = self.folder / f"rows-{indices[0]:08d}-{indices[-1] + 1:08d}.npy"
        with named_full_disk(path):
            write_atomically(path, lambda file: np.save(file, rows))

    def rows(self, count):
        """Yield the rows 0 … count − 1, one part in memory at a time."""
        index, parts = 0, self.parts()
        while index < count:
            start, stop, path = next(part for part in parts if part[0] <= index < part[1])
            try:
                part = np.load(path)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path} is damaged ({error}); delete it and run the same again") from None
            yield from part[index - start : count - start]
            index = stop

    def trim(self, count):
        """Rows beyond the first `count` are left out of the npz."""

    def clear(self):
        """Delete the parts, once the npz has their rows."""
        for _, _, path in self.parts():
            path.unlink()


def write_in_threads(write, batches, threads=4):
    """Call write(*batch) for each batch in threads; yield when it is done, in order.

    What the iterator `batches` gave before it failed is still written. An error of `write` is raised where it is due.
    """
    failures = []

    def until_failure():
        try:
            yield from batches
        except BaseException as error:  # a keyboard interrupt as well
            failures.append(error)

    # as many calls as threads: each has begun, so that leaving the loop early cancels none
    yield from ordered_map(lambda batch: write(*batch), until_failure(), ahead=threads - 1, threads=threads)
    if failures:
        raise failures[0]


def write_npz(path, name, rows, count):
    """Stream `count` arrays of one shape and dtype into array `name`, (count, …), of an npz; complete or absent.

    Raises InputError where shapes differ, rows are too few, or the disk is full.
    """
    rows = iter(rows)
    first = next(rows)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape)}

    def write(file):
        written = 0
        # ZipInfo has a fixed date: the same samples give the same bytes
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for written, row in enumerate(itertools.chain([first], rows), 1):
                    if (row.shape, row.dtype) != (first.shape, first.dtype):
                        raise InputError(
                            f"{path}: image {written - 1} is {row.shape} {row.dtype}, those before are {first.shape} "
                            f"{first.dtype}; delete that image and run the same again"
                        )
                    member.write(row.tobytes())
        if written != count:
            raise InputError(f"{path}: {written} images instead of {count}; run the same again")

    with named_full_disk(path):
        write_atomically(path, write)


def pack(store, target, count):
    """Pack a store's rows into the npz `target`, unless target is None; exactly `count`, checked. Raises InputError."""
    store.trim(count)
    missing = store.missing(count)
    if missing:
        raise InputError(
            f"{store.folder}: {len(missing)} of {count} images are missing, the first is {missing[0]}; "
            "run the same again"
        )
    if target is not None:
        write_npz(target, store.name, store.rows(count), count)


def remove_leftovers(folder):
    """Delete what killed processes left half-written of this result: nothing would ever read it."""
    for path in [*folder.rglob(".*.tmp"), *folder.parent.glob(f".{folder.name}.npz.*.tmp")]:
        path.unlink(missing_ok=True)


def prepare_folder(folder, settings, resume=True):
    """Make the folder of a result, or check that what is in it has the same settings. Raises InputError.

    settings: of a SampleManifest; resume False refuses a folder with finished images.
    """
    record = folder / SETTINGS
    has_images = any(path.suffix in (".png", ".npy") for path in folder.rglob("*"))
    if has_images and not record.exists():
        raise InputError(f"{folder} holds images of unknown settings (no {record.name}); pass another --sample-dir")
    if not resume and (has_images or folder.with_name(folder.name + ".npz").exists()):
        raise InputError(f"{folder} holds finished images; resume with --resume, or pass another --sample-dir")
    if record.exists():
        check_settings(folder, settings)
    remove_leftovers(folder)
    with named_full_disk(folder):
        write_json(record, settings)
