"""A command that fills one folder, can be killed at any moment, and goes on where it was when run again.

While it runs, DEST/.partial holds the job's ticket (what it was asked to do), a journal of the finished batches and
files that are not whole yet. Batches are fixed by index: one that the journal lacks is redone whole. The manifest is
written last, so a folder with a manifest is complete, and running the command again does nothing.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from pathlib import Path

from dataset import FORMAT, MANIFEST, VERSION, read_json, read_manifest
from models.errors import InputError

PARTIAL = ".partial"
TICKET = "job.json"


def to_json(content):
    """JSON bytes for people: one line per entry."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def versions(*packages):
    """Versions of Python, numpy, Pillow and the given packages, for a manifest."""
    named = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", *packages)}
    return {"python": platform.python_version(), **named}


def sha256_of_file(path, progress=None):
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress is not None:
                progress.update(len(block))
    return digest.hexdigest()


def split(count, size):
    """Batches of fixed index: list of ranges."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Job:
    """One command's work on one folder; `ticket` is what it was asked to do, as plain JSON data."""

    def __init__(self, dest, ticket):
        self.dest, self.partial = Path(dest), Path(dest) / PARTIAL
        self.ticket = json.loads(json.dumps(ticket))
        self._journal = None

    def begin(self):
        """Make or resume the folder. Returns False where everything is there already.

        Raises InputError where the folder holds something else.
        """
        if self.dest.exists() and not self.dest.is_dir():
            raise InputError(f"--dest {self.dest} is a file; name a folder")
        manifest = read_manifest(self.dest)
        if manifest is not None:
            self._compare(manifest.get("job"), "holds another result")
            shutil.rmtree(self.partial, ignore_errors=True)
            return False
        if (self.partial / TICKET).is_file():
            self._compare(read_json(self.partial / TICKET), "is half filled by another command")
            return True
        if self.dest.is_dir() and any(entry.name != PARTIAL for entry in self.dest.iterdir()):
            raise InputError(f"--dest folder must be empty: {self.dest} is not; empty it or name another")
        self.partial.mkdir(parents=True, exist_ok=True)
        self.put(f"{PARTIAL}/{TICKET}", to_json(self.ticket), flush=True)
        return True

    def is_complete(self):
        """True once the manifest is there."""
        return (self.dest / MANIFEST).is_file()

    def _compare(self, found, what):
        different = sorted(k for k in {*self.ticket, *(found or {})} if (found or {}).get(k) != self.ticket.get(k))
        if different:
            key = different[0]
            raise InputError(
                f"--dest {self.dest} {what} ({key}: {(found or {}).get(key)!r} there, {self.ticket.get(key)!r} now); "
                "empty it, or name another folder"
            )

    def put(self, name, data, flush=False):
        """Write bytes to DEST/name at once: under a temporary name, then renamed; flush: to disk before."""
        target, temporary = self.dest / name, self.partial / f"{os.getpid()}-{uuid.uuid4().hex}"
        with open(temporary, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)

    def record(self, batch, **facts):
        """Note in the journal that batch number `batch` is finished, with facts about it."""
        if self._journal is None:  # a new file per run: the last line of a killed run may be cut off
            self._journal = open(self.partial / f"done-{uuid.uuid4().hex}.jsonl", "ab", buffering=0)
        self._journal.write((json.dumps({"batch": batch, **facts}) + "\n").encode())

    def finished(self):
        """{batch: facts} of every finished batch, of all processes and earlier runs."""
        records = {}
        for path in sorted(self.partial.glob("done-*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:  # a line that was cut off has no end
                fact = json.loads(line)
                records[fact["batch"]] = fact
        return records

    def finish(self, files, manifest):
        """Write the last files {name: bytes}, then the manifest, then clear away what was partial."""
        for name, data in files.items():
            self.put(name, data, flush=True)
        content = {"format": FORMAT, "version": VERSION, **manifest, "job": self.ticket}
        self.put(MANIFEST, to_json(content), flush=True)
        if self._journal is not None:
            self._journal.close()
        shutil.rmtree(self.partial, ignore_errors=True)
