"""Reading and writing small files: whole or not at all, with one-line errors that name the file."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import tempfile
from pathlib import Path

from common.errors import InputError


def write_atomically(path, write, durable=True, temporary=None):
    """Call write(file) on a temporary name, then rename: no half file under the final name.

    durable: flush to disk before the rename, so that this holds after a power cut as well.
    temporary: a name on the same file system, for a caller that clears away what a killed process leaves there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    try:
        with open(temporary, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path, flag):
    """Make the folder of the file `path`. Raises InputError where it cannot be written, before work is done for it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written ({error.strerror}); name another file") from None
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; name a file")


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


@contextlib.contextmanager
def named_full_disk(path):
    """Turn a full disk, or a spent quota, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space and run the same again, what is finished is kept"
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None


def sha256_of_files(*paths, progress=None):
    """Hex sha256 of files, one after the other, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                if progress is not None:
                    progress.update(len(block))
    return digest.hexdigest()


def read_bytes(path, remedy):
    """Content of a file. Raises InputError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def map_file(path, remedy):
    """Memory map of a file for reading, b"" of an empty one. Raises InputError."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def read_lines(path, where=None):
    """[(number, text)] of the lines of a UTF-8 file that are not blank, numbered from 1. Raises InputError.

    where: names the file in messages, with its flag; default: its path.
    """
    where = where or path
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); name another file") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{where} is empty; name another file")
    return found
