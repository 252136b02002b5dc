"""Names and labels on disk: dataset.json of the folder layout, names.txt, and the walk through a folder of files.

is_data decides what counts as data, for folders, zips, samples and captions alike.
"""

import collections.abc
import dataclasses
import errno
import hashlib
import itertools
import json
import operator
import os
import re
import stat
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import FailFast, Field

from common.errors import InputError, unreadable
from common.files import map_file, read_bytes
from common.records import parse_record
from latents.manifest import CHECK, LABELS_JSON, MAX_CLASSES, PREPARE

NO_LABEL = -(2**63)  # of an image without one, among int64 labels; -1 would be a wrong label
NO_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # never in a file name; the gap is for non-UTF-8 bytes
# what operating systems leave behind, in lower case; names that begin with a dot are skipped too
LEFT_BEHIND = {"__macosx", "network trash folder", "temporary items", "lost+found"}
LEFT_BEHIND |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
LEFT_BEHIND |= {"@eadir", "@tmp", "#recycle", "@recycle", "@recently-snapshot", "@__thumb"}  # of network disks


def is_data(name):
    """False for a relative name (with `/`) of a hidden or system file, or of a file in such a folder."""
    return not any(part.startswith(".") or part.lower() in LEFT_BEHIND for part in name.split("/"))


def is_inside(name):
    """True for a valid relative file name that stays inside its folder."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and not NO_NAME.search(name)


def walk(folder, ancestors=()):
    """(relative name with `/`, (bytes, mtime in ns)) of every data file, following links except to a parent folder.

    Raises InputError for a folder that cannot be listed.
    """
    here = os.path.realpath(folder)
    if here in ancestors:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found = _stat(entry) if is_data(entry.name) else None
                if found and stat.S_ISDIR(found.st_mode):
                    for name, version in walk(entry.path, (*ancestors, here)):
                        yield f"{entry.name}/{name}", version
                elif found and stat.S_ISREG(found.st_mode):
                    yield entry.name, (found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise unreadable(error, folder, "move it away") from None


def _stat(entry):
    """stat_result of a directory entry; None for a dangling link or one to itself."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def walk_files(folder, suffixes):
    """Sorted relative names (with `/`) of the files under `folder` whose lower-cased suffix is in `suffixes`."""
    return sorted(name for name, _ in walk(folder) if os.path.splitext(name)[1].lower() in suffixes)


Label = Annotated[int, Field(gt=NO_LABEL, lt=MAX_CLASSES)]


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
    names = [name for name, _ in pairs]
    if outside := [name for name in names if not is_inside(name)]:
        raise InputError(f"{path}: {outside[0]!r} leaves the folder or is not a file name; {PREPARE}")
    if twice := [name for name, following in itertools.pairwise(names) if name == following]:
        raise InputError(f"{path} lists {twice[0]!r} more than once; {PREPARE}")
    return names, np.array([NO_LABEL if label is None else label for _, label in pairs], np.int64)


def class_of(name):
    """Top-level folder of a relative name; '' for a file in the root."""
    return name.split("/", 1)[0] if "/" in name else ""


def label_by_folder(names):
    """(labels, class names or None) of images by sorted top-level folder; a single folder gives no labels."""
    folders = sorted(set(map(class_of, names)))
    if len(folders) <= 1:
        return np.full(len(names), NO_LABEL), list(filter(None, folders)) or None
    number_of = {folder: number for number, folder in enumerate(folders)}
    return np.array([number_of[class_of(name)] for name in names], np.int64), folders


def fingerprint(names, versions, labels):
    """sha256 of the names, versions (such as sizes) and labels of images; NO_LABEL for an image without one."""
    digest = hashlib.sha256()
    for name, version, label in zip(names, versions, labels, strict=True):
        text = f"{name}\0{version}\0{None if label == NO_LABEL else label}\n"
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def label_json(names, labels):
    """Bytes of dataset.json as published: null as soon as one image lacks a label."""
    labels = np.asarray(labels)
    if (labels == NO_LABEL).any():
        return b'{"labels": null}'
    return json.dumps({"labels": list(zip(names, labels.tolist(), strict=True))}).encode()


class Names(collections.abc.Sequence):
    """names.txt, memory-mapped: names[i] is the source name of row i."""

    def __init__(self, path, count, content=None):
        """content: the file's bytes, if it is in a zip."""
        content = map_file(path, CHECK) if content is None else content
        width = content.find(b"\n") + 1 or 1
        if len(content) != count * width:
            raise InputError(f"{path} does not hold {count} lines of one width; {CHECK}")
        self._lines = np.frombuffer(content, f"S{width}")

    def __len__(self):
        return len(self._lines)

    def __getitem__(self, index):
        return self._lines[index].rstrip(b" \n").decode("utf-8", "surrogateescape")

    def same(self, other):
        """True where the other holds the same names in the same order."""
        return np.array_equal(self._lines, other._lines)


def check_names(names):
    """Raise InputError for a name with a line break, which names.txt cannot hold."""
    if odd := next((name for name in names if "\n" in name), None):
        raise InputError(f"the file name {odd!r} contains a line break; rename the file")


def pack_names(names):
    """Bytes of names.txt: each name padded with spaces to the longest. Raises InputError on a line break."""
    check_names(names)
    names = [name.encode("utf-8", "surrogateescape") for name in names]
    width = max(map(len, names), default=0)
    return b"".join(name.ljust(width) + b"\n" for name in names)
