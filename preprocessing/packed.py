"""Writing packed sets: rows go to fixed places of raw shards, by any process and in any order."""

import contextlib
import hashlib
import math
import os

import numpy as np

from common.errors import InputError
from common.files import sha256_of_files
from common.progress import Progress
from latents.manifest import LABELS, NAMES
from latents.names import NO_LABEL, pack_names
from preprocessing.jobs import batches_of, to_npy
from preprocessing.options import STORED


def shard_name(number):
    """File name of shard `number`."""
    return f"rows-{number:05d}.bin"


class ShardWriter:
    """Puts rows of one shape into the shards of a job's partial folder; options: StoredFlags."""

    def __init__(self, job, shape, options):
        self.job, self.shape, self.shard_size = job, tuple(shape), options.shard_size
        self.dtype = np.dtype(STORED[options.stored_dtype])
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape)
        self._files = {}

    def write(self, positions, rows, names):
        """Write rows (B, *shape) of names[position] and wait for the disk. Raises InputError on overflow."""
        with np.errstate(over="ignore"):
            stored = np.asarray(rows, dtype=self.dtype)
        for position, values in zip(positions, stored, strict=True):
            if not np.isfinite(values).all():
                culprit = f"{names[position]} gives values that are not finite in {self.dtype.name}"
                raise InputError(f"{culprit}; try --dtype or --stored-dtype fp32")
            shard, row = divmod(position, self.shard_size)
            file, data, offset = self._open(shard), values.tobytes(), row * self._row_bytes
            while data:
                written = os.pwrite(file, data, offset)
                data, offset = data[written:], offset + written
        for file in {self._open(position // self.shard_size) for position in positions}:
            getattr(os, "fdatasync", os.fsync)(file)

    def _open(self, shard):
        if shard not in self._files:
            path, placed = self.job.partial / shard_name(shard), self.job.dest / shard_name(shard)
            if placed.is_file() and not path.exists():  # placed by a run that was killed at its end
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.replace(placed, path)
            self._files[shard] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        return self._files[shard]

    def finish(self, count, kept, names, labels, manifest, files):
        """Put the shards in place, then the other files, then the manifest.

        kept: sorted positions out of `count` with a row; names, labels: of the kept rows, in order.
        """
        if compact := len(kept) < count:
            self._compact(kept)
        for file in self._files.values():
            os.close(file)
        shards = self._place(len(kept), "kept-" if compact else "")
        self.job.remove_stale([shard["file"] for shard in shards])
        files = {NAMES: pack_names(names), **files}
        labels = np.array(labels, "<i8")
        if manifest["num_classes"] == 1:
            labels[labels == NO_LABEL] = 0  # images of a single class have no label, as published
        if (labels != NO_LABEL).all():
            files[LABELS] = to_npy(labels)
        checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        content = {"layout": "packed", "count": len(kept), "shape": self.shape, "dtype": self.dtype.str}
        content |= {"shard_size": self.shard_size, "shards": shards, "files": checksums}
        self.job.finish(files, {**manifest, **content})

    def _compact(self, kept):
        """Copy the kept rows to shards of their own: rows that were left out leave no gap."""
        for number, rows in enumerate(batches_of(len(kept), self.shard_size)):
            with open(self.job.partial / f"kept-{shard_name(number)}", "wb") as out:
                for k in rows:
                    shard, row = divmod(kept[k], self.shard_size)
                    out.write(os.pread(self._open(shard), self._row_bytes, row * self._row_bytes))
                out.flush()
                os.fsync(out.fileno())

    def _place(self, count, prefix):
        """Checksum every shard and rename it into place; one that an earlier run has placed stays."""
        shards = []
        with Progress(total=count * self._row_bytes, unit="B", unit_scale=True, desc="checksums") as bar:
            for number, rows in enumerate(map(len, batches_of(count, self.shard_size))):
                name = shard_name(number)
                source, target = self.job.partial / f"{prefix}{name}", self.job.dest / name
                path = source if source.is_file() else target
                if path.stat().st_size > rows * self._row_bytes:  # rows of images no longer in the source
                    os.truncate(path, rows * self._row_bytes)
                shards.append({"file": name, "count": rows, "sha256": sha256_of_files(path, progress=bar)})
                if path is source:
                    os.replace(source, target)
        return shards
