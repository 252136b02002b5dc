"""A command that fills one folder, can be killed at any moment, and resumes when run again.

While it runs, DEST/.partial holds the job's ticket (what it was asked to do), a journal of the finished batches, and
files that are not whole yet. Batches are fixed by index: one that the journal lacks, or whose images have changed, is
redone whole. The manifest is written last, so a folder with a manifest is complete, and running it again does nothing.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import uuid
from pathlib import Path

import numpy as np

from common.errors import InputError, note
from common.files import write_atomically
from common.progress import Progress
from common.records import check_record, parse_record, read_record
from latents.manifest import AGAIN, ENCODERS, FORMAT, MANIFEST, VERSION, DataManifest
from latents.names import is_data, walk
from latents.sets import PARTIAL
from models.specs import LatentSpec
from preprocessing.channels import ChannelSums, normalizing

TICKET = "job.json"
OWN = re.compile(r"\d{5,}/img(-mean-std-)?\d{8,}\.\w+|rows-\d{5,}\.bin")  # names of the files that the commands write


def to_json(content):
    """JSON bytes for people: one line per entry."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def to_npy(array):
    """Bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def batches_of(count, size):
    """The ranges that split `count` positions into `size` each; the last may have fewer."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclasses.dataclass
class Finished:
    """A line of the journal: a batch that is finished."""

    batch: int
    left_out: dict[int, str] = dataclasses.field(default_factory=dict)  # {position: reason}
    made_from: tuple[str, str] | None = None  # (name of its first image, digest)
    sums: ChannelSums | None = None  # of its moments, for --normalize

    def to_line(self):
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()


class Job:
    """One command's work on one folder; `ticket` is what it was asked to do, as plain JSON data.

    made_from: (names of the images, batch size, function positions → digest of the images there); without it, a
    half-filled folder is refused if the ticket's source has changed.
    """

    def __init__(self, dest, ticket, made_from=None):
        self.dest, self.partial = Path(dest), Path(dest) / PARTIAL
        self.ticket = json.loads(json.dumps(ticket))
        self._names, self._batch_size, self._digest = made_from or ((), 1, None)
        self._journal, self._resumed = None, False

    def begin(self):
        """Prepare the folder, or resume; False if everything is there. Raises InputError if it holds something else."""
        manifest = DataManifest.read(self.dest)
        if manifest is not None:
            self._compare(manifest.job, "holds another result")
            shutil.rmtree(self.partial, ignore_errors=True)
            return False
        if (self.partial / TICKET).is_file():
            found = read_record(dict, self.partial / TICKET, "name another --dest")
            self._compare(found, "is half filled by another command", {"source"} if self._names else ())
            self._forget_changed()
            self._resumed = True
            return True
        if self.dest.is_file() or any(is_data(entry.name) for entry in self.dest.glob("*")):
            raise InputError(f"--dest folder must be empty: {self.dest} is not; name another")
        self.put(f"{PARTIAL}/{TICKET}", to_json(self.ticket), durable=True)
        return True

    def _compare(self, found, what, free=()):
        for key in sorted((self.ticket | found).keys() - set(free)):
            there, now = found.get(key), self.ticket.get(key)
            if key in ENCODERS and there and now:  # the same encoder may have moved to another folder
                there, now = (check_record(ENCODERS[key], spec, f"{self.dest}, {key}", AGAIN) for spec in (there, now))
                there.check_same(now, f"--dest {self.dest}", now.FLAG)
            elif there != now:
                raise InputError(f"--dest {self.dest} {what} ({key}: {there!r} there, {now!r} now); name another")

    def put(self, name, data, durable=False):
        """Write the bytes `data` to DEST/name, whole or not at all; durable: wait until the disk has them."""
        temporary = self.partial / f"{os.getpid()}-{uuid.uuid4().hex}"  # removed with the rest if the process is killed
        write_atomically(self.dest / name, lambda file: file.write(data), durable, temporary)

    def record(self, batch, left_out=None, rows=()):
        """Note in the journal that batch number `batch` is finished; left_out: {position: reason}; rows: the others."""
        if self._journal is None:  # a new file per run: the last line of a killed run may be cut off
            self._journal = open(self.partial / f"done-{uuid.uuid4().hex}.jsonl", "ab", buffering=0)
        sums = ChannelSums.of(rows) if self.ticket.get("normalize") and len(rows) else None
        line = Finished(batch, left_out or {}, self._made_from(batch), sums).to_line()
        if self._journal.write(line) < len(line):  # the disk is nearly full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._journal.name)

    def _made_from(self, batch):
        """Entry of Finished for batch number `batch`; None if there is no such batch, or the source is unknown."""
        batch = range(len(self._names))[batch * self._batch_size : (batch + 1) * self._batch_size]
        return (self._names[batch[0]], self._digest(batch)) if batch else None

    def records(self):
        """[Finished] of the finished batches, of all processes and earlier runs."""
        found = []
        for path in self.partial.glob("done-*.jsonl"):
            lines = path.read_bytes().split(b"\n")[:-1]  # the last one is empty, or was cut off
            found += parse_record(list[Finished], b"[" + b",".join(lines) + b"]", path, "name another --dest")
        return found

    def _forget_changed(self):
        """Remove batches whose images have changed from the journal, even if the images are restored later."""
        found, journals = self.records(), list(self.partial.glob("done-*.jsonl"))
        same = [record for record in found if record.made_from == self._made_from(record.batch)]
        firsts = {record.made_from and record.made_from[0] for record in found}
        if found and not same and firsts.isdisjoint(self._names):
            raise InputError(f"--dest {self.dest} is half filled with other images; name another")
        if same != found:
            lines = b"".join(record.to_line() for record in same)
            self.put(f"{PARTIAL}/done-{uuid.uuid4().hex}.jsonl", lines, durable=True)
            for path in journals:
                path.unlink()

    def unfinished(self, batches):
        """(numbers of the batches that the journal lacks, how many positions the others have)."""
        done = {record.batch for record in self.records()}
        todo = [number for number in range(len(batches)) if number not in done]
        return todo, sum(map(len, batches)) - sum(len(batches[number]) for number in todo)

    def run(self, batches, work, unit, rank=0, world=1):
        """Do the work on the batches that the journal lacks, every `world`-th of them, under a progress bar.

        work: a generator function of the batches. For each in turn, once its rows are written, it yields what `record`
        takes: {position: reason}, and the rows of the others. It is closed even after errors, so that its workers end.
        """
        todo, done = self.unfinished(batches)
        mine, total = [number for number in todo if number % world == rank], sum(map(len, batches))
        about = {"total": total, "initial": done, "unit": unit, "desc": self.ticket["command"]}
        results = work([batches[number] for number in mine])
        with contextlib.closing(results), Progress(**about, disable=rank > 0) as bar:
            for number, (left_out, rows) in zip(mine, results, strict=True):
                self.record(number, left_out, rows)
                bar.update(min(len(batches[number]) * world, total - bar.n))
        if self._journal is not None:
            self._journal.close()  # so that the first process can read all of it, on any file system

    def kept(self, names):
        """(positions of `names` that were kept, [[name, reason]] of the others). Raises InputError if none was."""
        reasons = dict(sorted(pair for record in self.records() for pair in record.left_out.items()))
        left_out = [[names[position], reason] for position, reason in reasons.items()]
        kept = [position for position in range(len(names)) if position not in reasons]
        if left_out and not kept:
            raise InputError(f"--source: not one image could be used; the first, {': '.join(left_out[0])}; repair them")
        for name, reason in left_out:
            note(f"left out: {name} ({reason})")
        return kept, left_out

    def finish(self, files, manifest):
        """Write the last files {name: bytes}, then the manifest, then remove what was partial."""
        content = {"format": FORMAT, "version": VERSION, **manifest, "job": self.ticket}
        if self.ticket.get("normalize"):
            sums = {record.batch: record.sums for record in self.records() if record.sums}
            spec = check_record(LatentSpec, manifest["latents"], "latents", AGAIN)
            content["latents"] = dataclasses.asdict(normalizing(spec, [sums[batch] for batch in sorted(sums)]))
        for name, data in {**files, MANIFEST: to_json(content)}.items():
            self.put(name, data, durable=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def remove_stale(self, names):
        """Remove images and rows not among `names`: an earlier run made them from images that have changed since."""
        if self._resumed:
            for name in {name for name, _ in walk(self.dest) if OWN.fullmatch(name)}.difference(names):
                (self.dest / name).unlink()
