"""Rows of a set by index, in either layout, and the images that belong to them.

Letters: B rows of a batch, C latent channels, h = w latent size, R image side.
"""

import io
import math
import mmap
import resource
import threading
from pathlib import Path

import numpy as np

from common.errors import InputError, first_line, system_fault
from common.files import map_file, read_bytes
from latents.manifest import CHECK
from latents.names import is_inside

PARSING = threading.Lock()  # numpy parses headers with ast, which is not safe in threads before Python 3.13


def read_array(path, remedy):
    """The array in a .npy file. Raises InputError."""
    content = io.BytesIO(read_bytes(path, remedy))
    try:
        with PARSING:
            array = np.load(content, allow_pickle=False)
    except Exception as error:  # numpy's parser raises nearly everything on damaged headers, which may claim any size
        raise InputError(f"{path} is truncated or not a .npy file ({first_line(error)}); {remedy}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an npz, not a .npy file; {remedy}")
    return array


def read_floats(path, remedy):
    """The float16, float32 or float64 array in a .npy file. Raises InputError."""
    array = read_array(path, remedy)
    if array.dtype.kind != "f" or array.itemsize > 8:
        raise InputError(f"{path} holds {array.dtype}, not float16, float32 or float64; {remedy}")
    return array


class FolderRows:
    """Rows of the folder layout: one .npy per image, all of one shape."""

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), names
        first = self._load(names[0])
        self.shape, self.dtype = first.shape, first.dtype.newbyteorder("=")

    def __len__(self):
        return len(self.names)

    def read(self, index, out):
        """Copy row `index` into out, of the row's shape. Raises InputError on a missing, truncated or odd file."""
        array = self._load(self.names[index])
        if array.shape != self.shape:
            path = self.folder / self.names[index]
            raise InputError(f"{path} has shape {array.shape}, the others {self.shape}; encode it again; {CHECK}")
        out[...] = array

    def gather(self, indices, out, places, pool):
        """Copy rows `indices` (list) to out[places]; the pool's threads read the files."""
        list(pool.map(self.read, indices, [out[place] for place in places]))

    def _load(self, name):
        return read_floats(self.folder / name, f"encode it again; {CHECK}")


def major_faults():
    """How often this process has waited for the disk at a memory map."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class PackedRows:
    """Rows of the packed layout: `shards` of raw C-order rows, memory-mapped; only the last has fewer rows."""

    COLD = 64  # batches whose rows are asked for ahead: the first ones, and those after one that waited for the disk

    def __init__(self, manifest):
        self.shape, self.dtype = manifest.shape, np.dtype(manifest.dtype)
        self._count, self._shard_size = manifest.count, manifest.shard_size
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape)
        self._maps = [self._map(manifest.path.parent / shard.file, shard.count) for shard in manifest.shards]
        self._shards = [np.frombuffer(content, self.dtype).reshape(-1, *self.shape) for content in self._maps]
        self._cold = self.COLD  # asking costs a third where nothing is cold

    def _map(self, path, count):
        content, size = map_file(path, "pack or copy it again"), count * self._row_bytes
        if len(content) != size:
            raise InputError(f"{path} has {len(content)} bytes instead of {size}: truncated; pack or copy it again")
        return content

    def __len__(self):
        return self._count

    def read(self, index, out):
        """Copy row `index` into out, of the row's shape."""
        shard, row = divmod(index, self._shard_size)
        out[...] = self._shards[shard][row]

    def gather(self, indices, out, places, _pool):
        """Copy rows `indices` (list) to out[places]."""
        faults = major_faults()
        if self._cold:
            self._ask_for(indices)
        if len(self._shards) == 1 and len(places) == len(out) and out.dtype == self.dtype:
            np.take(self._shards[0], indices, axis=0, out=out, mode="clip")  # "clip" fills `out` without a second copy
        else:
            for index, place in zip(indices, places, strict=True):
                out[place] = self._shards[index // self._shard_size][index % self._shard_size]
        self._cold = self.COLD if major_faults() > faults else max(self._cold - 1, 0)

    def _ask_for(self, indices):
        """Let the system read rows ahead: from a cold disk many at once are four times faster than one by one."""
        for shard, row in (divmod(index, self._shard_size) for index in indices):
            start = row * self._row_bytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, page, start + self._row_bytes - page)


class StoredRows:
    """Rows of a set, and of its mirrored twin where there is one, gathered in the stored precision."""

    def __init__(self, rows, mirror=None):
        self.rows, self.mirror = rows, mirror

    def gather(self, indices, flip, pool, pin):
        """Tensor of the rows `indices`, int64 (B,), those where `flip` is true of the twin; pin: page-locked memory."""
        import torch  # what writes and checks rows needs none

        dtype = torch.from_numpy(np.empty(0, self.rows.dtype)).dtype
        out = torch.empty((len(indices), *self.rows.shape), dtype=dtype, pin_memory=pin)
        for rows, chosen in ((self.rows, ~flip), (self.mirror, flip)):
            if chosen.any():
                rows.gather(indices[chosen].tolist(), out.numpy(), np.flatnonzero(chosen).tolist(), pool)
        return out


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason."""


def to_rgb(image):
    """A PIL image as RGB, published treatment. Raises BadImageError for samples without an 8-bit meaning."""
    from PIL import Image  # only alignment and preprocessing read images

    deep_png = image.mode == "I" and image.format == "PNG"
    if image.mode.startswith("I;16") or deep_png:  # Pillow's own conversion would clip everything above 255 to white
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImageError("32-bit samples have no stated range")
    return image.convert("RGB")


class ImageFiles:
    """Image files of a data folder, as uint8 (3, R, R)."""

    def __init__(self, folder, name_of, resolution):
        self.folder, self._name_of, self.resolution = Path(folder), name_of, resolution

    def gather(self, indices, flip, pool):
        """uint8 images (B, 3, R, R); rows where `flip` is true are mirrored, as their moments are."""
        import torch

        return torch.from_numpy(np.stack(list(pool.map(self.load, indices, flip))))

    def load(self, index, flip):
        """uint8 image (3, R, R), mirrored if `flip`. Raises InputError."""
        from PIL import Image  # only alignment reads images

        name, side = self._name_of(index), self.resolution
        path = self.folder / name
        if not is_inside(name):
            raise InputError(f"{path} leaves the folder; {CHECK}")
        try:
            with Image.open(path) as image:
                pixels = np.asarray(to_rgb(image))
        except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
            fault = f"{path} is missing or not a readable image ({first_line(error)}); convert again; {CHECK}"
            raise InputError(system_fault(error, path) or fault) from None
        if pixels.shape != (side, side, 3):
            raise InputError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, the latents are of {side}x{side} images")
        return pixels.transpose(2, 0, 1)[:, :, :: -1 if flip else 1]
