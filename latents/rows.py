"""TODO docstring."""

import collections.abc
import io
import math
import mmap
import os
import threading
import warnings
import weakref
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import numpy as np
import torch

from common.errors import InputError
from latents.manifest import CHECK, LABELS_JSON, MANIFEST


class FolderRows:
    """Moments of a folder layout: one .npy of shape (2C, h, w) per image."""

    def __init__(self, folder, names, shape=None):
        self.folder, self.names = Path(folder), names
        self._header, self._parsing = None, threading.Lock()
        first = self._load(names[0])
        self.shape, self.dtype = tuple(shape or first.shape), first.dtype
        header = (self.folder / names[0]).read_bytes()[: -first.nbytes]
        if b"'fortran_order': False" in header:
            self._header = header  # of nearly every file

    def __len__(self):
        return len(self.names)

    def read(self, index, out):
        """Copy row `index` into out (2C, h, w). Raises InputError on a missing, truncated or odd file."""
        out[...] = self._load(self.names[index], self.shape)

    def gather(self, indices, out, places, pool):
        """Copy rows `indices` (list) to out[places], each file read by one of the pool's threads."""
        list(pool.map(self.read, indices, [out[place] for place in places]))

    def _load(self, name, shape=None):
        path = self.folder / name
        try:
            content = path.read_bytes()
            if self._header is not None and content.startswith(self._header):
                return np.frombuffer(content, self.dtype, offset=len(self._header)).reshape(self.shape)
            with self._parsing:  # numpy parses headers with ast, which is not safe in threads before Python 3.13
                array = np.load(io.BytesIO(content), allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {LABELS_JSON} lists it; encode again; {CHECK}") from None
        except (ValueError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else "empty"
            raise InputError(f"{path} is truncated or no .npy ({reason}); delete it and encode again") from None
        if shape is not None and array.shape != shape:
            raise InputError(f"{path} has shape {array.shape}, the others {shape}; encode it again; {CHECK}")
        return array


def major_faults():
    """How often this process has waited for the disk at a memory map; 0 where rows cannot be asked for in advance."""
    if resource is None or not hasattr(mmap, "MADV_WILLNEED"):
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class PackedRows:
    """Rows of a packed set: `shards` of raw C-order rows, all but the last of `shard_size` rows, memory-mapped."""

    COLD = 64  # batches whose rows are asked for in advance: the first ones, and those after one that had to wait

    def __init__(self, folder, manifest):
        self.shape, self.dtype = tuple(manifest["shape"]), np.dtype(manifest["dtype"])
        self._count, self._shard_size = manifest["count"], manifest["shard_size"]
        row_bytes = self.dtype.itemsize * math.prod(self.shape)
        self._buffers = [self._map(Path(folder) / s["file"], s["count"] * row_bytes) for s in manifest["shards"]]
        self._shards = [np.frombuffer(b, self.dtype).reshape(-1, *self.shape) for b in self._buffers]
        if sum(map(len, self._shards)) != self._count:
            raise InputError(f"{Path(folder) / MANIFEST}: the shards do not add up to {self._count} rows; pack again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would warn that nothing may be written to the map
            self._only = torch.from_numpy(self._shards[0]) if len(self._shards) == 1 else None
        self._row_bytes = row_bytes
        self._cold = self.COLD  # batches to ask for in advance, which costs a fifth where nothing is cold

    @staticmethod
    def _map(path, size):
        try:
            with open(path, "rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    raise InputError(f"{path} has {actual} bytes instead of {size}: truncated; pack or copy it again")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {MANIFEST} lists it; pack or copy it again") from None

    def __len__(self):
        return self._count

    def read(self, index, out):
        """Copy row `index` into out, an array of the row's shape."""
        shard, row = divmod(index, self._shard_size)
        out[...] = self._shards[shard][row]

    def gather(self, indices, out, places, _pool):
        """Copy rows `indices` (list) to out[places]."""
        faults = major_faults()
        if self._cold:
            self._prefetch(indices)
        shards, size = self._shards, self._shard_size
        whole = len(places) == len(out) and out.dtype == self.dtype
        if self._only is not None and whole:  # twice as fast: one call, on all of torch's threads
            torch.index_select(self._only, 0, torch.tensor(indices), out=torch.from_numpy(out))
        else:
            for index, place in zip(indices, places, strict=True):
                out[place] = shards[index // size][index % size]
        waited = major_faults() > faults
        self._cold = self.COLD if waited else max(self._cold - 1, 0)

    def _prefetch(self, indices):
        """Ask the system for all these rows at once: from a cold disk four times faster than one by one."""
        for index in indices:
            shard, row = divmod(index, self._shard_size)
            start = row * self._row_bytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._buffers[shard].madvise(mmap.MADV_WILLNEED, page, start + self._row_bytes - page)


class ImageFiles:
    """Image files of a data folder: images[i] is uint8 (3, R, R)."""

    def __init__(self, folder, name_of, resolution):
        self.folder, self._name_of, self.resolution = Path(folder), name_of, resolution

    def gather(self, indices, flip, pool):
        """uint8 images (B, 3, R, R); rows where `flip` is true are mirrored, as their moments are."""
        images = list(pool.map(self._load, indices, flip))
        return torch.from_numpy(np.stack(images))

    def _load(self, index, flip):
        from PIL import Image  # only alignment reads images

        path, side = self.folder / self._name_of(index), self.resolution
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though the latents list it; convert again; {CHECK}") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{path} is no readable image ({error}); convert it again") from None
        if pixels.shape != (side, side, 3):
            raise InputError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, the latents are of {side}x{side} images")
        return pixels.transpose(2, 0, 1)[:, :, :: -1 if flip else 1]


class Buffers:
    """Memory of batches, used again once nobody holds the tensor: fresh pages cost as much as copying the rows."""

    def __init__(self):
        self._free = collections.deque()

    def take(self, shape, dtype):
        """An uninitialised tensor; its memory comes back by itself when the tensor and its views are gone."""
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.shape != shape:
            buffer = np.empty(shape, dtype)
        view = buffer[:]
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return torch.from_numpy(view)


class StoredRows:
    """Rows of a set, and of its mirrored twin where there is one, gathered in the stored precision."""

    def __init__(self, rows, mirror=None):
        self.rows, self.mirror, self._buffers = rows, mirror, Buffers()

    def gather(self, indices, flip, pool, pin):
        """Tensor of the rows `indices`, int64 (B,), those where `flip` is true of the twin; pin: page-locked memory."""
        shape, dtype = (len(indices), *self.rows.shape), self.rows.dtype
        if pin:  # torch keeps page-locked memory for the next batch by itself
            out = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        else:
            out = self._buffers.take(shape, dtype)
        for rows, chosen in ((self.rows, ~flip), (self.mirror, flip)):
            if chosen.any():
                rows.gather(indices[chosen].tolist(), out.numpy(), np.flatnonzero(chosen).tolist(), pool)
        return out
