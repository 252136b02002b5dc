"""Lists of millions of names that take no memory: sorted on disk, and dataset.json read and written piece by piece.

What waits on disk are temporary files without a name ($TMPDIR says where), so that nothing is left of a killed
process. N names, each with a few whole numbers of 64 bits.
"""

import bisect
import collections.abc
import heapq
import io
import itertools
import json
import mmap
import operator
import os
import pickle
import re
import struct
import tempfile

import numpy as np

RUN = 1 << 16  # entries that are sorted in memory at once
BLOCK = 256  # entries that are read back at once
NAME = operator.itemgetter(0)
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


# ---------------------------------------------------------------------------------------------------- sorted names


def sorted_on_disk(entries):
    """Tuples (name, …) in order of their names, equal names as they came; RUN of them are in memory at once."""
    entries, runs = iter(entries), []
    while run := sorted(itertools.islice(entries, RUN), key=NAME):
        runs.append(_spill(run))
    return heapq.merge(*runs, key=NAME)


def _spill(run):
    """Iterator over a list, which waits in a temporary file."""
    file = tempfile.TemporaryFile()
    for start in range(0, len(run), BLOCK):
        pickle.dump(run[start : start + BLOCK], file)
    file.seek(0)
    return _read_back(file, len(run))


def _read_back(file, count):
    with file:
        for _ in range(0, count, BLOCK):
            yield from pickle.load(file)


def last_of_each(entries):
    """Of neighbours with the same name the last one, as a dict would keep it."""
    for _, same in itertools.groupby(entries, NAME):
        *_, entry = same
        yield entry


def integers_on_disk(count):
    """int64 (count,) of zeros in a temporary file."""
    with tempfile.TemporaryFile() as file:
        for _ in range(count // BLOCK + 1):
            file.write(bytes(8 * BLOCK))  # written, so that a full disk is an error here and not in the map
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)[:count]


class NameTable(collections.abc.Sequence):
    """Sorted names with `columns` int64 numbers each, memory-mapped: table[i] is a name, table.column(k) an array.

    entries: tuples (name, number, …) in any order; unique: of equal names keep the last.
    """

    def __init__(self, entries, columns=0, unique=False):
        entries = sorted_on_disk(entries)
        row, end, self._count, self._width = struct.Struct(f"{1 + columns}q"), 1, 0, 1 + columns
        with tempfile.TemporaryFile() as names, tempfile.TemporaryFile() as rows:
            names.write(b"\0")  # an empty file cannot be mapped
            for name, *numbers in last_of_each(entries) if unique else entries:
                rows.write(row.pack(end, *numbers))
                end += names.write(name.encode("utf-8", "surrogatepass"))
                self._count += 1
            rows.write(row.pack(end, *[0] * columns))
            names.flush()
            rows.flush()
            self._names = mmap.mmap(names.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows = memoryview(mmap.mmap(rows.fileno(), 0, access=mmap.ACCESS_READ)).cast("q")
        self._next = 0

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        start, end = self._rows[index * self._width], self._rows[(index + 1) * self._width]
        return self._names[start:end].decode("utf-8", "surrogatepass")

    def cut(self, count):
        """Keep the first `count` names; None: all."""
        self._count = min(self._count, self._count if count is None else count)

    def column(self, k):
        """int64 (N,): number k of every name."""
        return np.frombuffer(self._rows, np.int64).reshape(-1, self._width)[: self._count, 1 + k]

    def find(self, name):
        """Index of a name, or None. Names that are asked for in order are found at once, others by bisection."""
        index = self._next
        if index >= self._count or self[index] != name:
            index = bisect.bisect_left(self, name)
        if index >= self._count or self[index] != name:
            return None
        self._next = index + 1
        return index

    def __contains__(self, name):
        return self.find(name) is not None


class Kept:
    """item(i) of every position i < count that is not left out, in order; can be gone through again and again."""

    def __init__(self, count, left_out, item=int):
        self._count, self._left_out, self._item = count, left_out, item

    def __len__(self):
        return self._count - len(self._left_out)

    def __iter__(self):
        return (self._item(i) for i in range(self._count) if i not in self._left_out)

    def of(self, item):
        """Something else of the same positions."""
        return Kept(self._count, self._left_out, item)


# ----------------------------------------------------------------------------------------------------- dataset.json


class JsonText:
    """The JSON text of a binary file, taken piece by piece. Raises ValueError where it is none."""

    PIECE, SPACE, DECODER = 1 << 16, re.compile(r"[ \t\r\n]*"), json.JSONDecoder()

    def __init__(self, file):
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogatepass")
        self._text, self._at = "", 0

    def _more(self):
        """Read on, and forget what was taken. False at the end of the file."""
        piece = self._file.read(max(self.PIECE, len(self._text)))
        if piece:
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def take(self, mark):
        """Skip white space; True, and go past it, where `mark` comes next."""
        self._at = self.SPACE.match(self._text, self._at).end()
        while self._at == len(self._text) and self._more():
            self._at = self.SPACE.match(self._text, self._at).end()
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def expect(self, mark):
        """As take, for what has to come next."""
        if not self.take(mark):
            raise ValueError(f"{mark} expected, found {self._text[self._at : self._at + 20]!r}")

    def value(self):
        """The value that comes next, whole."""
        self.take("")
        while True:
            try:
                value, end = self.DECODER.raw_decode(self._text, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            if end < len(self._text) or not self._more():  # a number at the end of a piece may go on in the next
                self._at = end
                return value

    def items(self):
        """The items of a list whose [ is taken."""
        if self.take("]"):
            return
        yield self.value()
        while self.take(","):
            yield self.value()
        self.expect("]")

    def end(self):
        """The rest of an object, one value of which is taken."""
        while self.take(","):
            self.value()
            self.expect(":")
            self.value()
        self.expect("}")
        self.take("")
        if self._at < len(self._text):
            raise ValueError(f"nothing expected, found {self._text[self._at : self._at + 20]!r}")


def read_labels(file):
    """The items of 'labels' in a binary file like dataset.json, one by one; None where it is null.

    Raises ValueError where the file is no JSON (while iterating, too), KeyError where it has no 'labels', TypeError
    where they are no list.
    """
    text = JsonText(file)
    if not text.take("{"):
        text.value()
        raise KeyError("labels")
    if text.take("}"):
        raise KeyError("labels")
    while text.value() != "labels":
        text.expect(":")
        text.value()
        if not text.take(","):
            text.end()
            raise KeyError("labels")
    text.expect(":")
    if text.take("["):
        return _label_items(text)
    if text.value() is not None:
        raise TypeError("'labels' is no list")
    return text.end()


def _label_items(text):
    yield from text.items()
    text.end()


def label_json(names, labels):
    """Pieces of dataset.json as published: null as soon as one image lacks a label. Both are gone through twice."""
    if any(label == NO_LABEL for label in labels):
        yield b'{"labels": null}'
        return
    yield b'{"labels": ['
    for k, (name, label) in enumerate(zip(names, labels, strict=True)):
        yield (", " * (k > 0) + json.dumps([name, int(label)])).encode()
    yield b"]}"
