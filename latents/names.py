"""Names and labels on disk: dataset.json of the folder layout, names.txt, and the walk through a folder of files."""

import collections.abc
import dataclasses
import json
import operator
import os
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import FailFast, Field

from common.errors import InputError
from common.files import map_file, read_bytes
from common.records import parse_record
from latents.manifest import CHECK, LABELS_JSON, PREPARE

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


Label = Annotated[int, Field(gt=NO_LABEL, lt=-NO_LABEL)]


@dataclasses.dataclass
class LabelList:
    """Content of dataset.json."""

    labels: Annotated[list[tuple[str, Label | None]] | None, FailFast()]  # [[name, label], …]; of faults the first


def read_label_list(folder):
    """(names, labels int64 (N,)) of a folder layout, sorted by name; (None, None) of null. Raises InputError."""
    path = Path(folder) / LABELS_JSON
    names, labels = parse_label_list(read_bytes(path, PREPARE), path)
    if names is not None and (labels == NO_LABEL).any():
        unlabelled = names[int(np.argmax(labels == NO_LABEL))]
        raise InputError(f"{path}: the label of {unlabelled} is null, not an integer; {PREPARE}")
    return names, labels


def parse_label_list(data, path):
    """read_label_list of the bytes `data` of the file `path`; an image whose label is null has NO_LABEL."""
    pairs = parse_record(LabelList, data, path, PREPARE).labels
    if pairs is None:
        return None, None
    pairs.sort(key=operator.itemgetter(0))
    labels = [NO_LABEL if label is None else label for _, label in pairs]
    return [name for name, _ in pairs], np.array(labels, np.int64)


def label_json(names, labels):
    """Bytes of dataset.json as published: null as soon as one image lacks a label."""
    labels = np.asarray(labels)
    if (labels == NO_LABEL).any():
        return b'{"labels": null}'
    return json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}).encode()


class Names(collections.abc.Sequence):
    """names.txt, memory-mapped: names[i] is the source name of row i."""

    def __init__(self, path, count):
        self._count, self._map = count, map_file(path, CHECK)
        self._width = self._map.find(b"\n") + 1 if count else 1
        if len(self._map) != count * self._width:
            raise InputError(f"{path} does not hold {count} lines of one width; {CHECK}")

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
