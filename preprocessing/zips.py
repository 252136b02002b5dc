"""Zips of millions of members: their directory stays in the file, it never becomes a list in memory."""

import io
import itertools
import os
import pickle
import struct
import tempfile
import zipfile

SLICE = 256  # directory entries that are parsed at once
ENTRY, END, LOCATOR, END_64 = b"PK\1\2", b"PK\5\6", b"PK\6\7", b"PK\6\6"
ENTRY_BYTES, END_BYTES, BOTH_64 = 46, 22, 76  # of a directory entry and of end records, without names and comments


def find_directory(path):
    """(first byte of the directory, byte after its last, bytes that were put before the zip). Raises BadZipFile."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 16) - END_BYTES - BOTH_64))
        tail = file.read()
    at = tail.rfind(END)
    if at < 0 or at + END_BYTES > len(tail):
        raise zipfile.BadZipFile("File is not a zip file")
    length, start = struct.unpack("<2L", tail[at + 12 : at + 20])
    if at >= BOTH_64 and tail.startswith(END_64, at - BOTH_64) and tail.startswith(LOCATOR, at - 20):
        at -= BOTH_64
        length, start = struct.unpack("<2Q", tail[at + 40 : at + 56])
    end = size - len(tail) + at
    if not 0 <= start <= end - length:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return end - length, end, end - length - start


def parse(entries):
    """ZipInfo of consecutive directory entries, a list of bytes: zipfile reads them as a directory of their own."""
    data, count = b"".join(entries), len(entries)
    end = struct.pack("<4s4H2LH", END, 0, 0, count, count, len(data), 0, 0)
    with zipfile.ZipFile(io.BytesIO(data + end)) as archive:
        return archive.infolist()


class ZipReader:
    """Members of a zip, by the position of their entry in its directory. Raises BadZipFile where it is damaged."""

    FIELDS = ("CRC", "compress_size", "file_size", "compress_type", "flag_bits")

    def __init__(self, path):
        self._path = path
        self._start, self._end, self._shift = find_directory(path)
        self._archive = zipfile.ZipFile(io.BytesIO(END + bytes(END_BYTES - len(END))))
        self.reopen()

    def reopen(self):
        """Own file handle, for a forked process."""
        self._archive.fp = open(self._path, "rb")

    def entries(self):
        """(name, bytes, position) of every file in the order of the directory."""
        read = self._read_entries()
        while some := list(itertools.islice(read, SLICE)):
            for (position, _), info in zip(some, parse([data for _, data in some]), strict=True):
                if not info.is_dir():
                    yield info.filename, info.file_size, position

    def _read_entries(self):
        with open(self._path, "rb") as file:
            file.seek(self._start)
            while file.tell() < self._end:
                position = file.tell()
                yield position, self._entry(file.read)

    @staticmethod
    def _entry(read):
        fixed = read(ENTRY_BYTES)
        if len(fixed) < ENTRY_BYTES or not fixed.startswith(ENTRY):
            raise zipfile.BadZipFile("Bad magic number for central directory")
        return fixed + read(sum(struct.unpack("<3H", fixed[28:34])))

    def open(self, position):
        """Binary file of the member whose directory entry is at `position`."""
        with open(self._path, "rb") as file:
            file.seek(position)
            (found,) = parse([self._entry(file.read)])
        info = zipfile.ZipInfo(found.orig_filename)
        for field in self.FIELDS:
            setattr(info, field, getattr(found, field))
        info.header_offset = found.header_offset + self._shift
        return self._archive.open(info)

    def read(self, position):
        """Bytes of the member whose directory entry is at `position`."""
        with self.open(position) as file:
            return file.read()

    def read_by_name(self, name):
        """Bytes of a member with an ASCII name, or None; the whole directory is searched, of equal names the last."""
        raw, found = name.encode(), None
        for position, entry in self._read_entries():
            if entry.startswith(raw, ENTRY_BYTES) and entry[28:30] == struct.pack("<H", len(raw)):
                found = position
        return None if found is None else self.read(found)


class Spool:
    """A list that can be appended to and iterated, pickled to a temporary file."""

    def __init__(self):
        self._file, self._count = tempfile.TemporaryFile(), 0

    def append(self, item):
        pickle.dump(item, self._file)
        self._count += 1

    def __len__(self):
        return self._count

    def __iter__(self):
        self._file.seek(0)
        for _ in range(self._count):
            yield pickle.load(self._file)


class Forgetful(dict):
    """A dict that keeps nothing."""

    def __setitem__(self, key, value):
        pass


def create_zip(path):
    """A stored zip to write whose directory waits on disk."""
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
    archive.filelist, archive.NameToInfo = Spool(), Forgetful()
    return archive
