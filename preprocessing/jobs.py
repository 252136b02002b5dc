"""A command that fills one folder, can be killed at any moment, and resumes when run again.

While it runs, DEST/.partial holds the job's ticket (what it was asked to do), a journal of the finished batches, and
files that are not whole yet. Batches are fixed by index: one that the journal lacks is redone whole. The manifest is
written last, so a folder with a manifest is complete, and running the command again does nothing.
"""

import collections.abc
import io
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import read_json, write_atomically
from latents.manifest import FORMAT, MANIFEST, PARTIAL, VERSION, DataManifest

TICKET = "job.json"


def to_json(content):
    """JSON bytes for people: one line per entry."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def to_npy(array):
    """Bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Batches(collections.abc.Sequence):
    """Batches of fixed index: the ranges that split `count` positions into `size` each; the last may have fewer."""

    def __init__(self, count, size):
        self._count, self._starts = count, range(0, count, size)

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, number):
        start = self._starts[number]
        return range(start, min(start + self._starts.step, self._count))


class Job:
    """One command's work on one folder; `ticket` is what it was asked to do, as plain JSON data."""

    def __init__(self, dest, ticket):
        self.dest, self.partial = Path(dest), Path(dest) / PARTIAL
        self.ticket = json.loads(json.dumps(ticket))
        self._journal = None

    def begin(self):
        """Make or resume the folder. Returns False if everything is there already.

        Raises InputError if the folder holds something else.
        """
        if self.dest.exists() and not self.dest.is_dir():
            raise InputError(f"--dest {self.dest} is a file; name a folder")
        manifest = DataManifest.read(self.dest)
        if manifest is not None:
            self._compare(manifest.job, "holds another result")
            shutil.rmtree(self.partial, ignore_errors=True)
            return False
        if (self.partial / TICKET).is_file():
            self._compare(read_json(self.partial / TICKET), "is half filled by another command")
            return True
        if self.dest.is_dir() and any(entry.name != PARTIAL for entry in self.dest.iterdir()):
            raise InputError(f"--dest folder must be empty: {self.dest} is not; empty it or name another")
        self.partial.mkdir(parents=True, exist_ok=True)
        self.put(f"{PARTIAL}/{TICKET}", to_json(self.ticket), durable=True)
        return True

    def is_complete(self):
        """True once the manifest is there."""
        return (self.dest / MANIFEST).is_file()

    def _compare(self, found, what):
        different = sorted(key for key in self.ticket | found if found.get(key) != self.ticket.get(key))
        if different:
            key = different[0]
            raise InputError(
                f"--dest {self.dest} {what} ({key}: {found.get(key)!r} there, {self.ticket.get(key)!r} now); "
                "empty it, or name another folder"
            )

    def put(self, name, data, durable=False):
        """Write the bytes `data` to DEST/name, whole or not at all; durable: wait until the disk has them."""
        temporary = self.partial / f"{os.getpid()}-{uuid.uuid4().hex}"  # removed with the rest if the process is killed
        write_atomically(self.dest / name, lambda file: file.write(data), durable, temporary)

    def record(self, batch, **facts):
        """Note in the journal that batch number `batch` is finished, with facts about it."""
        if self._journal is None:  # a new file per run: the last line of a killed run may be cut off
            self._journal = open(self.partial / f"done-{uuid.uuid4().hex}.jsonl", "ab", buffering=0)
        self._journal.write((json.dumps({"batch": batch, **facts}) + "\n").encode())

    def records(self):
        """Facts about every finished batch, of all processes and earlier runs."""
        for path in self.partial.glob("done-*.jsonl"):
            with open(path, "rb") as file:
                yield from (json.loads(line) for line in file if line.endswith(b"\n"))  # others were cut off

    def finished(self, count):
        """bool (count,): which of `count` batches are finished."""
        done = np.zeros(count, bool)
        done[[record["batch"] for record in self.records()]] = True
        return done

    def left_out(self):
        """{position: reason} of the images that were left out, in order."""
        reasons = (record["left_out"].items() for record in self.records())
        return dict(sorted((int(index), reason) for items in reasons for index, reason in items))

    def finish(self, files, manifest):
        """Write the last files {name: bytes}, then the manifest, then remove what was partial."""
        for name, data in files.items():
            self.put(name, data, durable=True)
        content = {"format": FORMAT, "version": VERSION, **manifest, "job": self.ticket}
        self.put(MANIFEST, to_json(content), durable=True)
        if self._journal is not None:
            self._journal.close()
        shutil.rmtree(self.partial, ignore_errors=True)
