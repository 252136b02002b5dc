"""Writing packed sets: rows go to fixed places of raw shards, by any process and in any order."""

import math
import os

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.files import sha256_of_files
from latents.manifest import LABELS, NAMES
from latents.names import NO_LABEL, pack_names
from preprocessing.jobs import Batches, to_npy
from preprocessing.options import SHARD_SIZE, STORED


def shard_name(number):
    """File name of shard `number`."""
    return f"rows-{number:05d}.bin"


def packed_labels(labels, num_classes):
    """labels.npy, int64 (N,), as bytes, or None if labels are missing.

    A single class, without labels as published, is class 0.
    """
    labels = np.asarray(labels, "<i8")
    if (labels == NO_LABEL).any():
        if num_classes != 1:
            return None
        labels = np.zeros_like(labels)
    return to_npy(labels)


class ShardWriter:
    """Puts rows of one shape and dtype into the shards of a job's partial folder."""

    def __init__(self, job, shape, dtype="float16", shard_size=SHARD_SIZE):
        self.job, self.shape, self.dtype = job, tuple(shape), np.dtype(dtype).newbyteorder("<")
        self.shard_size = shard_size
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape)
        self._files = {}

    @classmethod
    def from_flags(cls, job, shape, options):
        """A writer as StoredFlags say."""
        return cls(job, shape, STORED[options.stored_dtype], options.shard_size)

    def write(self, positions, rows, names):
        """Write rows (B, *shape) at the given positions and wait until the disk has them.

        names: what the rows came from. Raises InputError naming the one with a value that dtype cannot hold.
        """
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, dtype=self.dtype)
        if not np.isfinite(stored).all():
            bad = int(np.flatnonzero(~np.isfinite(stored).reshape(len(stored), -1).all(axis=1))[0])
            raise InputError(f"{names[bad]} gives values that are not finite in {self.dtype.name}; try --dtype fp32")
        touched = set()
        for position, values in zip(positions, stored, strict=True):
            shard, row = divmod(position, self.shard_size)
            file = self._open(shard)
            self._write_all(file, values.tobytes(), row * self._row_bytes)
            touched.add(file)
        for file in touched:
            os.fdatasync(file) if hasattr(os, "fdatasync") else os.fsync(file)

    def _open(self, shard):
        if shard not in self._files:
            path = self.job.partial / shard_name(shard)
            self._files[shard] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        return self._files[shard]

    @staticmethod
    def _write_all(file, data, offset):
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written

    def close(self):
        """Close the shard files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def finish(self, count, kept, names, labels, manifest, files=None):
        """Put the shards in place, then labels, names and manifest; kept: sorted positions out of `count` with a row.

        names, labels: of the kept rows, in order; a label may be NO_LABEL. files: {name: bytes} of further files.
        """
        self.close()
        prefix = ""
        if len(kept) < count:
            self._compact(kept)
            prefix = "kept-"
        shards = self._place(len(kept), prefix)
        files = {NAMES: pack_names(names), **(files or {})}
        labels = packed_labels(labels, manifest["num_classes"])
        if labels is not None:
            files[LABELS] = labels
        for name, data in files.items():
            self.job.put(name, data, durable=True)
        checksums = {name: sha256_of_files(self.job.dest / name) for name in files}
        content = {"layout": "packed", "count": len(kept), "shape": list(self.shape), "dtype": self.dtype.str}
        content |= {"shard_size": self.shard_size, "shards": shards}
        self.job.finish({}, {**manifest, **content, "files": checksums})

    def _compact(self, kept):
        """Copy the kept rows to shards of their own: rows that were left out leave no gap."""
        for number, rows in enumerate(Batches(len(kept), self.shard_size)):
            with open(self.job.partial / f"kept-{shard_name(number)}", "wb") as out:
                for k in rows:
                    shard, row = divmod(kept[k], self.shard_size)
                    out.write(os.pread(self._open(shard), self._row_bytes, row * self._row_bytes))
        self.close()

    def _place(self, count, prefix):
        """Checksum every shard and rename it into place; one that an earlier run has placed stays."""
        shards = []
        with tqdm(total=count * self._row_bytes, unit="B", unit_scale=True, desc="checksums") as bar:
            for number, rows in enumerate(map(len, Batches(count, self.shard_size))):
                name = shard_name(number)
                source, target = self.job.partial / f"{prefix}{name}", self.job.dest / name
                path = source if source.is_file() else target
                if not path.is_file() or path.stat().st_size != rows * self._row_bytes:
                    raise InputError(f"{path} was changed while the command ran; empty {self.job.dest} and start again")
                shards.append({"file": name, "count": rows, "sha256": sha256_of_files(path, progress=bar)})
                if path is source:
                    os.replace(source, target)
        return shards
