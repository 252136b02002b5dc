"""What sampling leaves on disk: PNG files or the rows of an npz, written in threads, resumable, never half written.

A store keeps finished rows by image index: `PngFiles` as FOLDER/000000.png …, `PartFiles` (npz without PNGs, and
latents) as one file per batch, deleted once the npz exists. `pack` streams the rows of either into an npz. Every file
has a seal, the SHA-256 of its name and rows, which reveals damaged, altered and swapped files; those of earlier
versions have none.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.errors import InputError, first_line, note
from common.files import read_bytes, remove_leftovers, sha256_of_files, write_atomically, write_json
from common.look_ahead import ordered_map
from latents.names import walk
from sampling.manifest import SEALED, SETTINGS, check_settings

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
REMEDY = "run the same again"


class Damaged(InputError):
    """The content of a file is not what was written."""


class Store:
    """Rows in files of a folder.

    Subclasses: files(count) → {path: indices of its rows}, in order; decode(path, bytes) → (rows, seal or "");
    has_more(count); finish() once the npz is written.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.sealed = False  # whether every file must have a seal

    def seal(self, path, rows):
        """Hex SHA-256 of a file's name in the folder and of its rows."""
        digest = hashlib.sha256(path.relative_to(self.folder).as_posix().encode())
        digest.update(np.ascontiguousarray(rows))
        return digest.hexdigest()

    def read(self, path):
        """Rows of a file (N, …). Raises Damaged, or InputError if it cannot be read."""
        data = read_bytes(path, f"move it away and {REMEDY}")
        try:
            rows, seal = self.decode(path, data)
        except MemoryError:
            raise
        except Exception as error:  # decoders can raise anything on a damaged file
            raise Damaged(f"{path} is damaged ({first_line(error)}); {REMEDY}") from None
        if (seal or self.sealed) and seal != self.seal(path, rows):
            raise Damaged(f"{path} is not as it was written; {REMEDY}")
        return rows

    def is_whole(self, path):
        """Whether a file can be read and is unchanged."""
        with contextlib.suppress(Damaged):
            self.read(path)
            return True
        return False

    def missing(self, count):
        """Indices below `count` that no intact file holds; damaged files are deleted."""
        files = self.files(count)
        whole = ordered_map(self.is_whole, files, self.threads, self.threads)
        damaged = [path for path, is_whole in zip(files, whole, strict=True) if not is_whole]
        if damaged:
            note(f"{len(damaged)} damaged or altered files are deleted and made again, the first is {damaged[0]}")
        for path in damaged:
            path.unlink()
            del files[path]
        return sorted(set(range(count)).difference(*files.values()))

    def rows(self, count):
        """Yield the rows 0 … count − 1, read by several threads with few files in memory. Raises InputError."""
        index, files = 0, self.files(count)
        for rows, held in zip(ordered_map(self.read, files, self.threads, self.threads), files.values(), strict=True):
            if held.start > index:
                break
            yield from rows[index - held.start : count - held.start]
            index = max(index, held.stop)
        if index < count:
            raise InputError(f"{self.folder} lacks image {index}; {REMEDY}")


class PngFiles(Store):
    """uint8 images (R, R, 3) as FOLDER/000000.png …, with the seal in a text chunk `sha256`."""

    name = "arr_0"  # ADM's name of the array in the npz
    kind = "png"
    pattern = "[0-9][0-9][0-9][0-9][0-9][0-9]*.png"
    threads = 16

    def path(self, index):
        return self.folder / f"{index:06d}.png"

    def files(self, count):
        # glob, not exists(): a network file system may cache that a file was absent
        there, paths = set(self.folder.glob(self.pattern)), map(self.path, range(count))
        return {path: range(index, index + 1) for index, path in enumerate(paths) if path in there}

    def decode(self, _path, data):
        if not data.endswith(PNG_END):
            raise ValueError("it is cut off")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()  # the checksums, which decoding ignores
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return np.asarray(picture)[None], picture.info.get("sha256", "")

    def write(self, indices, images):
        """Save the images that are not there yet; each is complete or absent."""
        for path, pixels in zip(map(self.path, indices), images, strict=True):
            if not path.exists():
                info = PngInfo()
                info.add_text("sha256", self.seal(path, pixels))
                save = functools.partial(Image.fromarray(pixels).save, format="PNG", compress_level=1, pnginfo=info)
                write_atomically(path, save, durable=False)

    def has_more(self, count):
        """Whether there are images beyond the first `count`."""
        images = {path for path in self.folder.glob(self.pattern) if path.stem.isdigit()}
        return bool(images.difference(map(self.path, range(count))))

    def finish(self):
        """Nothing to do: the images stay."""


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

    def missing(self, count):
        """As Store.missing; first writes what its images show to every prompt's folder."""
        for index, record in zip(range(0, count, self.per_prompt), self.metadata, strict=False):
            path, line = self.path(index).parents[1] / "metadata.jsonl", json.dumps(record) + "\n"
            write_atomically(path, lambda file, line=line: file.write(line.encode()), durable=False)
        return super().missing(count)


class PartFiles(Store):
    """Rows of an npz as one .npy per batch, FOLDER/rows-START-STOP.npy, the seal appended to the array."""

    kind = "parts"
    threads = 2  # a part is large

    def __init__(self, folder, name):
        super().__init__(folder)
        self.name = name  # of the npz's array

    def files(self, _count=None):
        parts = {path: span(path) for path in sorted(self.folder.glob("rows-*.npy"))}
        return {path: held for path, held in parts.items() if held}

    def decode(self, path, data):
        file = io.BytesIO(data)
        rows = np.load(file)
        if len(rows) != len(span(path)):
            raise ValueError(f"it holds {len(rows)} rows")
        return rows, data[file.tell() :].decode()

    def write(self, indices, rows):
        """Save a batch of consecutive images, complete or absent."""
        path = self.folder / f"rows-{indices[0]:08d}-{indices[-1] + 1:08d}.npy"

        def write(file):
            np.save(file, rows)
            file.write(self.seal(path, rows).encode())

        write_atomically(path, write)

    def has_more(self, count):
        """Whether there are rows beyond the first `count`."""
        return any(held.stop > count for held in self.files().values())

    def finish(self):
        """Delete the parts: the npz has their rows."""
        for path in self.files():
            path.unlink()


def span(path):
    """Indices of the rows in a part, by its name; None for other files."""
    match = re.fullmatch(r"rows-(\d{8})-(\d{8})\.npy", path.name)
    return match and range(int(match[1]), int(match[2]))


def write_npz(path, name, rows, count):
    """Stream `count` arrays into array `name`, (count, …), of an npz, whole or not at all. Raises InputError."""
    rows = iter(rows)
    first = next(rows)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape)}
    member = zipfile.ZipInfo(f"{name}.npy")  # has a fixed date: the same samples give the same bytes

    def write(file):
        with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index, row in zip(range(count), itertools.chain([first], rows), strict=True):
                if (row.shape, row.dtype) != (first.shape, first.dtype):
                    raise InputError(f"{path}: image {index} is {row.shape} {row.dtype}, unlike the first; {REMEDY}")
                array.write(row.tobytes())

    write_atomically(path, write)


def pack(store, target, count):
    """Pack exactly `count` rows of a store into the npz `target`, or only read them; returns the SHA-256 of the npz."""
    if target is not None:
        write_npz(target, store.name, store.rows(count), count)
        return sha256_of_files(target)
    for _ in store.rows(count):
        pass


def prepare_folder(folder, settings, resume=True):
    """Make the folder of a result, or check its settings; returns whether all its files have seals. Raises InputError.

    settings: those of a SampleManifest; resume=False refuses a folder with finished images.
    """
    record = folder / SETTINGS
    has_images = folder.is_dir() and any(name.endswith((".png", ".npy")) for name, _ in walk(folder))
    if has_images and not record.exists():
        raise InputError(f"{folder} holds images of unknown settings (no {SETTINGS}); pass another --sample-dir")
    if not resume and (has_images or Path(f"{folder}.npz").exists()):
        raise InputError(f"{folder} holds finished images; resume with --resume, or pass another --sample-dir")
    found = check_settings(folder, settings) if record.exists() else {}
    for left in folder.rglob(".*.tmp"):  # left by killed processes
        left.unlink(missing_ok=True)
    for suffix in (".npz", ".json"):
        remove_leftovers(f"{folder}{suffix}")
    sealed = found.get(SEALED, not has_images)
    write_json(record, {**settings, SEALED: sealed})
    return sealed
