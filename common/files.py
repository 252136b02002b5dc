"""Reading and writing small files: whole or not at all, with one-line errors that name the file."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
from pathlib import Path

from common.errors import REMEDIES, InputError, system_error, unreadable


def write_atomically(path, write, durable=True, temporary=None):
    """Call write(file) on a temporary file, then rename it: never a half file at `path`. Raises OSError naming `path`.

    durable: flush to disk before the rename, so that this holds after a power cut as well.
    temporary: a name on the same file system, for a caller that clears away what a killed process leaves there.
    """
    path = Path(path)
    temporary = Path(temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    with naming(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # it would hide the original error
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path, temporary=None):
    """Turn system errors in this context into an OSError that names a file, `path` if the error names none.

    temporary: the name of `path`, a file or folder, until it is finished; `path` is named in its place.
    """
    try:
        yield
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        if found.filename is None or (temporary and str(found.filename).startswith(str(temporary))):
            found.filename = str(path)
        raise found from None


@contextlib.contextmanager
def locked(path, flag, main=True):
    """Lock the file or folder `path` of a flag against other writers. Raises InputError at once if it is locked.

    Half-written files that killed processes left are removed. main: whether this process takes the lock; the others of
    a launch go on without. The lock is a file beside the result, removed when the context ends.
    """
    path = Path(os.path.realpath(path))
    alone = path.is_dir() and not os.access(path.parent, os.W_OK)  # the mount point of a volume, say
    lock = path / ".lock" if alone else path.parent / f".{path.name}.lock"
    with _open_lock(path, lock, flag) if main else contextlib.nullcontext() as file:
        if file:
            remove_leftovers(path)
            os.register_at_fork(after_in_child=file.close)  # a worker that outlives its command keeps no lock
        try:
            yield
        finally:
            if file:
                lock.unlink(missing_ok=True)


def _open_lock(path, lock, flag):
    """The lock file, locked until it is closed; a null context in a read-only folder, where nothing is written."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "rb")  # a pipe must not block
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS):
                return contextlib.nullcontext()
            raise _unwritable(error, path, flag) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"another process is writing {path}; wait for it, or pass another {flag}") from None
        except OSError:
            return file  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()  # the lock file of a process that has since ended and removed it


@contextlib.contextmanager
def whole_folder(folder, flag):
    """A locked temporary folder to fill, renamed to `folder` at the end: complete or absent. Replaces an empty one."""
    folder = Path(folder)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    with locked(folder, flag), naming(folder, partial):
        partial.mkdir()
        try:
            yield partial
            for path in (path for path in partial.rglob("*") if path.is_file()):
                # apply the umask: safetensors makes files readable by the owner only
                path.chmod(partial.stat().st_mode & 0o666)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(path):
    """Remove temporary files beside the result `path` whose processes no longer run."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        is_own = left.name == f".{path.name}.{number}.tmp"  # not that of a file whose name starts the same
        if is_own and number.isdecimal() and (int(number) == os.getpid() or not _is_alive(int(number))):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_alive(number):
    try:
        os.kill(number, 0)
    except PermissionError:  # it belongs to another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _unwritable(error, path, flag):
    remedy = REMEDIES.get(error.errno, "name another file")
    return InputError(f"{flag} {path} cannot be written ({error.strerror}); {remedy}")


def check_writable(path, flag):
    """Make the folder of the file `path`. Raises InputError if it cannot be written, before work is done for it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        remove_leftovers(path)
    except OSError as error:
        raise _unwritable(error, path, flag) from None
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder; name a file")


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def sha256_of_files(*paths, progress=None):
    """Hex sha256 of files, one after the other, read in pieces."""
    digest = hashlib.sha256()
    for path in paths:
        with open(regular(path), "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                if progress is not None:
                    progress.update(len(block))
    return digest.hexdigest()


def regular(path):
    """The path of a regular file. Raises OSError for anything else: reading a pipe or a device may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_bytes(path, remedy):
    """Content of a file. Raises InputError."""
    try:
        return Path(regular(path)).read_bytes()
    except OSError as error:
        raise unreadable(error, path, remedy) from None


def map_file(path, remedy):
    """Memory map of a file for reading, b"" of an empty one. Raises InputError."""
    try:
        with open(regular(path), "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise unreadable(error, path, remedy) from None


def read_lines(path, where=None):
    """[(number, text)] of the lines of a UTF-8 file that are not blank, numbered from 1. Raises InputError.

    where: names the file in messages, with its flag; default: its path.
    """
    where = where or path
    try:
        lines = Path(regular(path)).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise unreadable(error, where, "name another file") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{where} is empty; name another file")
    return found
