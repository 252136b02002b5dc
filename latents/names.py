"""TODO docstring."""

import collections.abc
import mmap
import os
from pathlib import Path

from common.errors import InputError
from latents.manifest import CHECK, LABELS_JSON, MANIFEST, NOT_PAIRS, PREPARE
from listing import NO_LABEL, NameTable, read_labels, walk


def read_label_list(folder):
    """(names, labels) of a folder layout, sorted by name as published readers do; labels None where they are null."""
    path = Path(folder) / LABELS_JSON
    if not path.is_file():
        raise InputError(f"{path} is missing: labels are read from it; {PREPARE}")
    try:
        with open(path, "rb") as file:
            pairs = read_labels(file)
            if pairs is None:
                return None, None
            table = NameTable((_name_and_label(path, pair) for pair in pairs), columns=1)
    except InputError:  # a ValueError too
        raise
    except KeyError:
        raise InputError(f"{path} has no 'labels'; {PREPARE}") from None
    except TypeError:
        raise InputError(f"{path}: {NOT_PAIRS}; {PREPARE}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or make the set again") from None
    return table, table.column(0)


def _name_and_label(path, pair):
    try:
        name, label = pair
    except (TypeError, ValueError):
        raise InputError(f"{path}: {NOT_PAIRS}; {PREPARE}") from None
    if type(label) is not int or not NO_LABEL < label < -NO_LABEL:
        raise InputError(f"{path}: the label of {name} is {label!r}, not an integer; {PREPARE}")
    return str(name), label


def walk_files(folder, suffixes):
    """Sorted relative names (with `/`) of the files under `folder` whose lower-cased suffix is in `suffixes`."""
    return NameTable((name,) for name, _ in walk(folder) if os.path.splitext(name)[1].lower() in suffixes)


class Names(collections.abc.Sequence):
    """`names.txt`, memory-mapped: names[i] is the source name of row i."""

    def __init__(self, path, count):
        self._path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {MANIFEST} lists it; {CHECK}") from None
        self.width = self._map.find(b"\n") + 1 if count else 1
        if len(self._map) != count * self.width:
            raise InputError(f"{path} does not hold {count} lines of one width; {CHECK}")
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        line = self._map[index * self.width : (index + 1) * self.width]
        return line.rstrip(b" \n").decode("utf-8", "surrogateescape")

    def same(self, other):
        """True where the other holds the same names in the same order."""
        return self._map[:] == other._map[:]


def pack_names(names):
    """Lines of `names.txt` as bytes: each name padded with spaces to the longest; `names` is gone through twice.

    Raises InputError on a line break.
    """
    width = 0
    for name in map(_to_bytes, names):
        if b"\n" in name:
            raise InputError(f"the file name {name!r} contains a line break; rename the file")
        width = max(width, len(name))
    yield from (name.ljust(width) + b"\n" for name in map(_to_bytes, names))


def _to_bytes(name):
    return name.encode("utf-8", "surrogateescape")
