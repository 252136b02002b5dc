"""Names and labels on disk: dataset.json of the folder layout, names.txt, and the walk through a folder of files."""

import collections.abc
import json
import mmap
import os
from pathlib import Path

import numpy as np

from common.errors import InputError
from latents.manifest import CHECK, LABELS_JSON, MANIFEST, PREPARE

NO_LABEL = -(2**63)  # of an image without one, among int64 labels; -1 would be a wrong label


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


def walk_files(folder, suffixes):
    """Sorted relative names (with `/`) of the files under `folder` whose lower-cased suffix is in `suffixes`."""
    return sorted(name for name, _ in walk(folder) if os.path.splitext(name)[1].lower() in suffixes)


# ------------------------------------------------------------------------------------------------------- dataset.json


def read_label_list(folder):
    """(names, labels int64 (N,)) of a folder layout, sorted by name; (None, None) where the labels are null.

    Raises InputError where dataset.json is missing, is not what it should be, or gives an image no label.
    """
    path = Path(folder) / LABELS_JSON
    try:
        names, labels = parse_label_list(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: labels are read from it; {PREPARE}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); restore it, or make the set again") from None
    if names is not None and (labels == NO_LABEL).any():
        unlabelled = names[int(np.argmax(labels == NO_LABEL))]
        raise InputError(f"{path}: the label of {unlabelled} is null, not an integer; {PREPARE}")
    return names, labels


def parse_label_list(data, path):
    """read_label_list of the bytes `data` of the file `path`; an image whose label is null has NO_LABEL."""
    try:
        content = json.loads(data.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or make the set again") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise InputError(f"{path} has no 'labels'; {PREPARE}")
    if content["labels"] is None:
        return None, None
    try:
        pairs = sorted(((str(name), label) for name, label in content["labels"]), key=lambda pair: pair[0])
    except (TypeError, ValueError):
        raise InputError(f"{path}: 'labels' is not a list of [file name, integer]; {PREPARE}") from None
    return [name for name, _ in pairs], np.array([_label(*pair, path) for pair in pairs], np.int64)


def _label(name, label, path):
    if label is None:
        return NO_LABEL
    if type(label) is not int or not NO_LABEL < label < -NO_LABEL:
        raise InputError(f"{path}: the label of {name} is {label!r}, not an integer; {PREPARE}")
    return label


def label_json(names, labels):
    """Bytes of dataset.json as published: null as soon as one image lacks a label."""
    labels = np.asarray(labels)
    if (labels == NO_LABEL).any():
        return b'{"labels": null}'
    return json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}).encode()


# ---------------------------------------------------------------------------------------------------------- names.txt


class Names(collections.abc.Sequence):
    """names.txt, memory-mapped: names[i] is the source name of row i."""

    def __init__(self, path, count):
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {MANIFEST} lists it; {CHECK}") from None
        self._width = self._map.find(b"\n") + 1 if count else 1
        if len(self._map) != count * self._width:
            raise InputError(f"{path} does not hold {count} lines of one width; {CHECK}")
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        line = self._map[index * self._width : (index + 1) * self._width]
        return line.rstrip(b" \n").decode("utf-8", "surrogateescape")

    def same(self, other):
        """True where the other holds the same names in the same order."""
        return self._map[:] == other._map[:]


def pack_names(names):
    """Bytes of names.txt: each name padded with spaces to the longest. Raises InputError on a line break."""
    names = [name.encode("utf-8", "surrogateescape") for name in names]
    if odd := next((name for name in names if b"\n" in name), None):
        raise InputError(f"the file name {odd!r} contains a line break; rename the file")
    width = max(map(len, names), default=0)
    return b"".join(name.ljust(width) + b"\n" for name in names)
