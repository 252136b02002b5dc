"""Datasets of VAE moments, the seekable sampler, and the loader that feeds training. docs/data.md shows the layouts.

    data = open_dataset("DATA")
    sampler = SeekableSampler(len(data), batch_size=256, seed=0)
    for batch in LatentLoader(data, sampler, start_step=1000, stop_step=2000, device="cuda"):
        latents = data.info.spec.sample(batch.moments, noise)

A data folder holds sets: `vae-sd` (moments), optionally `images` and `vae-sd-mirror` (moments of the flipped images).
A set of moments is either a folder layout (one .npy per image and `dataset.json`, as others prepare it too) or packed
(memory-mapped shards). This file is the home of both formats; preprocessing/ writes them.

Letters: N images, B rows of a batch, C latent channels, h = w latent size, R image side.
"""

import collections.abc
import dataclasses
import io
import json
import math
import mmap
import os
import queue
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import numpy as np
import torch

from listing import NO_LABEL, NameTable, read_labels, walk
from models.codec import LatentCodec, LatentSpec, resolve_vae, vae_family
from models.errors import InputError, note

MANIFEST = "manifest.json"
LABELS_JSON = "dataset.json"  # folder layout: {"labels": [[name, label], …]}
LABELS = "labels.npy"  # packed layout: int64 (N,)
NAMES = "names.txt"  # source name of every row, lines padded to one width, so that row i is found without reading
FORMAT = "deepflow-data"
VERSION = 1
MOMENTS, MIRROR, IMAGES, FEATURES = "vae-sd", "vae-sd-mirror", "images", "features-"
PREPARE = "prepare it with preprocessing/dataset_tools.py"
NOT_PAIRS = "'labels' is not a list of [file name, integer]"
CHECK = "python preprocessing/dataset_tools.py verify lists what is wrong"


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What training must know of a dataset; moments_shape is (2C, h, w), resolution the image side R = h·factor."""

    count: int
    num_classes: int
    spec: LatentSpec
    moments_shape: tuple
    resolution: int
    class_names: tuple | None = None

    def model_options(self):
        """Constructor arguments of a model for this data."""
        return {
            "num_classes": self.num_classes,
            "in_channels": self.spec.channels,
            "input_size": self.moments_shape[1],
        }

    def __str__(self):
        return (
            f"{self.count:,} latents {self.moments_shape}, {self.num_classes} classes, "
            f"VAE {self.spec.vae} at scale {self.spec.scale}"
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch: moments (B, 2C, h, w), labels int64 (B,), images uint8 or None.

    In text-to-image the features of a caption, (B, L, W), are in place of the label.
    features: one tensor (B, T, Z) per encoder whose features were opened.

    Moments keep the precision they are stored in (packed: fp16), so that half the bytes travel; sampled with float32
    noise they become float32.
    """

    step: int
    moments: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor | None
    features: tuple = ()

    def part(self, rows):
        """The given slice of the rows."""
        images = None if self.images is None else self.images[rows]
        return Batch(self.step, self.moments[rows], self.labels[rows], images, tuple(f[rows] for f in self.features))


# ------------------------------------------------------------------------------------------------- files of a set


def read_json(path):
    """Parse a JSON file. Raises InputError naming it when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or make the set again") from None


def read_manifest(folder):
    """Manifest of a set as a dict, or None where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a manifest of this project; move it away, or {PREPARE}")
    if manifest.get("version", 0) > VERSION:
        raise InputError(f"{path} has format version {manifest['version']}; this code reads {VERSION}: update the code")
    return manifest


def spec_from_manifest(manifest, folder):
    """The LatentSpec recorded in a manifest of moments."""
    try:
        return LatentSpec(**manifest["latents"])
    except (KeyError, TypeError):
        raise InputError(f"{Path(folder) / MANIFEST} does not say which VAE made the latents; encode again") from None


def spec_of_vae(name):
    """LatentSpec of a VAE by name or folder; only families that are not known by name are loaded."""
    if vae_family(resolve_vae(name)) == LatentSpec.family and not Path(resolve_vae(name)).is_dir():
        return LatentSpec(vae=resolve_vae(name))
    return LatentCodec.load(name).spec


def read_label_list(folder):
    """(names, labels) of a folder layout, sorted by name as published readers do; labels None where they are null."""
    path = Path(folder) / LABELS_JSON
    if not path.is_file():
        raise InputError(f"{path} is missing: labels are read from it; {PREPARE}")
    try:
        with open(path, "rb") as file:
            pairs = read_labels(file)
            if pairs is None:
                return None, None
            table = NameTable((_name_and_label(path, pair) for pair in pairs), columns=1)
    except InputError:  # a ValueError too
        raise
    except KeyError:
        raise InputError(f"{path} has no 'labels'; {PREPARE}") from None
    except TypeError:
        raise InputError(f"{path}: {NOT_PAIRS}; {PREPARE}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or make the set again") from None
    return table, table.column(0)


def _name_and_label(path, pair):
    try:
        name, label = pair
    except (TypeError, ValueError):
        raise InputError(f"{path}: {NOT_PAIRS}; {PREPARE}") from None
    if type(label) is not int or not NO_LABEL < label < -NO_LABEL:
        raise InputError(f"{path}: the label of {name} is {label!r}, not an integer; {PREPARE}")
    return str(name), label


def walk_files(folder, suffixes):
    """Sorted relative names (with `/`) of the files under `folder` whose lower-cased suffix is in `suffixes`."""
    return NameTable((name,) for name, _ in walk(folder) if os.path.splitext(name)[1].lower() in suffixes)


class Names(collections.abc.Sequence):
    """`names.txt`, memory-mapped: names[i] is the source name of row i."""

    def __init__(self, path, count):
        self._path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b""
        except FileNotFoundError:
            raise InputError(f"{path} is missing, though {MANIFEST} lists it; {CHECK}") from None
        self.width = self._map.find(b"\n") + 1 if count else 1
        if len(self._map) != count * self.width:
            raise InputError(f"{path} does not hold {count} lines of one width; {CHECK}")
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        line = self._map[index * self.width : (index + 1) * self.width]
        return line.rstrip(b" \n").decode("utf-8", "surrogateescape")

    def same(self, other):
        """True where the other holds the same names in the same order."""
        return self._map[:] == other._map[:]


def pack_names(names):
    """Lines of `names.txt` as bytes: each name padded with spaces to the longest; `names` is gone through twice.

    Raises InputError on a line break.
    """
    width = 0
    for name in map(_to_bytes, names):
        if b"\n" in name:
            raise InputError(f"the file name {name!r} contains a line break; rename the file")
        width = max(width, len(name))
    yield from (name.ljust(width) + b"\n" for name in map(_to_bytes, names))


def _to_bytes(name):
    return name.encode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------------------ rows


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


# --------------------------------------------------------------------------------------------------------- dataset


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


class LatentDataset:
    """Moments with labels, and images and features where asked for; made by open_dataset.

    features: {encoder: StoredRows}; workers: threads that read files.
    """

    def __init__(self, info, rows, labels, images=None, mirror=None, features=None, workers=4):
        self.info, self.labels, self.images, self.mirror = info, labels, images, mirror
        self.features = features or {}
        self._moments = StoredRows(rows, mirror)
        self._pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self):
        return self.info.count

    def gather(self, indices, flip=None):
        """(moments float32 (B, 2C, h, w), labels int64 (B,), images uint8 (B, 3, R, R) or None) of rows `indices`.

        flip: optional bool (B,), true where the mirrored set is meant.
        """
        moments, labels, images, *_ = self.gather_stored(indices, flip)
        return moments.float(), labels, images

    def gather_step(self, sampler, step, rows, pin=False):
        """gather_stored of the given rows (array) of the global batch of a step."""
        flip = sampler.flips(step)[rows] if self.mirror is not None else None
        return self.gather_stored(sampler.batch(step)[rows], flip, pin)

    def gather_stored(self, indices, flip=None, pin=False, condition=None):
        """As gather, then the features (B, T, Z) of each encoder, in the precision in which they are stored.

        pin: into page-locked memory; condition: what takes the place of the labels.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"row index out of range 0..{len(self) - 1}")
        flip = np.zeros(len(indices), bool) if flip is None else np.asarray(flip, bool)
        moments = self._moments.gather(indices, flip, self._pool, pin)
        features = [stored.gather(indices, flip, self._pool, pin) for stored in self.features.values()]
        labels = torch.from_numpy(self._labels_of(indices)) if condition is None else condition
        images = None if self.images is None else self.images.gather(indices.tolist(), flip.tolist(), self._pool)
        return moments, labels, images, *features

    def _labels_of(self, indices):
        labels = self.labels[indices]
        check_labels(labels, self.info.num_classes, "the labels")
        return np.asarray(labels, dtype=np.int64)

    def drop(self, labels, dropped):
        """Labels (B,) with the null class where `dropped` (B,) is true."""
        return torch.where(dropped, self.info.num_classes, labels)

    def conditions(self, n):
        """n labels for a picture, in class order; the null class n times; what is written of them."""
        labels = torch.arange(n) * self.info.num_classes // n
        return labels, torch.full_like(labels, self.info.num_classes), labels.tolist()


def check_labels(labels, num_classes, where):
    """Raise InputError unless every label is in 0..num_classes − 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise InputError(
            f"{where}: label {wrong[0]} is out of range for {num_classes} classes (0..{num_classes - 1}); "
            f"correct the labels or --num-classes; {CHECK}"
        )


def open_dataset(data_dir, *, images=False, mirror=False, features=(), num_classes=None, data_vae=None, workers=4):
    """Open a data folder of either layout, recognised by its files.

    images: also read `images`; mirror: also read `vae-sd-mirror`; features: names of the encoders whose `features-NAME`
    to read; num_classes, data_vae (name or folder of the VAE): what a folder without a manifest does not say; workers:
    threads that read files. Raises InputError with one line for everything that does not fit.
    """
    folder, manifest, rows, labels, names, spec = open_moments(data_dir, data_vae)
    if labels is None:
        raise InputError(
            f"{folder / LABELS_JSON}: labels are missing (null); put the images into class folders (one is enough), "
            "then convert and encode again"
        )
    classes = _count_classes(folder, manifest, labels, num_classes)
    if not is_packed(manifest):  # packed labels are checked as they are read: start-up must not depend on their number
        check_labels(labels, classes, folder / LABELS_JSON)
    class_names = manifest.get("class_names") if manifest else None
    info = DataInfo(
        count=len(rows),
        num_classes=classes,
        spec=spec,
        moments_shape=rows.shape,
        resolution=rows.shape[1] * spec.factor,
        class_names=tuple(class_names) if class_names else None,
    )
    image_files = open_images(data_dir, folder, names, info) if images else None
    mirrored = _open_mirror(data_dir, info) if mirror else None
    pairing = Pairing(folder, image_set(manifest), names, len(rows))
    stored = open_features(data_dir, features, pairing, mirror)
    return LatentDataset(info, rows, labels, image_files, mirrored, stored, workers)


def open_moments(data_dir, data_vae=None):
    """(folder, manifest or None, rows, labels or None, names or None, LatentSpec) of a data folder's moments."""
    folder = find_set(data_dir, MOMENTS)
    manifest, rows, labels, names = open_set(folder)
    if manifest is not None and "latents" not in manifest:
        raise InputError(f"{folder} holds {manifest.get('kind', 'no')} data, not VAE moments; encode it first")
    spec = _spec(folder, manifest, data_vae)
    _check_moments_shape(rows.shape, spec, folder)
    return folder, manifest, rows, labels, names, spec


def open_set(folder):
    """(manifest or None, rows, labels int64 (N,) or None, names of the source images or None) of one set."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        return manifest, *(_open_packed if is_packed(manifest) else _open_folder)(folder, manifest)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} lacks {error}; {PREPARE}") from None


def is_packed(manifest):
    """True where the manifest describes shards."""
    return manifest is not None and manifest.get("layout") == "packed"


def find_set(data_dir, name):
    """Folder of the set `name`: DATA/name, or DATA where the set itself is named. Raises InputError without one."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} does not exist; {PREPARE}")
    for folder in (data_dir / name, data_dir):
        if (folder / MANIFEST).is_file() or (folder / LABELS_JSON).is_file():
            return folder
    for folder in (data_dir / name, data_dir):
        if (folder / ".partial").is_dir():
            raise InputError(f"{folder} is not finished; run the same preprocessing command again, it resumes")
    raise InputError(f"--data-dir {data_dir} has no {name}/{LABELS_JSON} and no {MANIFEST}; {PREPARE}")


def _spec(folder, manifest, data_vae):
    if manifest is not None:
        spec = spec_from_manifest(manifest, folder)
        if data_vae is not None:
            spec.check_same(spec_of_vae(data_vae), str(folder), "--data-vae")
        return spec
    if data_vae is not None:
        return spec_of_vae(data_vae)
    spec = LatentSpec()
    note(
        f"warning: {folder} has no {MANIFEST}; its latents are taken as {spec.family} at scale {spec.scale} "
        "(another VAE: --data-vae)"
    )
    return spec


def _open_folder(folder, manifest):
    names, labels = read_label_list(folder)
    if names is None:
        names = walk_files(folder, {".npy"})
        if manifest is not None and manifest.get("num_classes") == 1:
            labels = np.zeros(len(names), np.int64)  # one class: published tools write null
    if not names:
        raise InputError(f"{folder} holds no latents; {PREPARE}")
    if manifest is not None and manifest["count"] != len(names):
        raise InputError(f"{folder} holds {len(names)} latents, its {MANIFEST} says {manifest['count']}; {CHECK}")
    sources = Names(folder / NAMES, len(names)) if manifest is not None else None
    return FolderRows(folder, names), labels, sources


def _open_packed(folder, manifest):
    if not manifest["count"]:
        raise InputError(f"{folder} holds no rows; {PREPARE}")
    labels = None
    if LABELS in manifest["files"]:
        try:
            labels = np.load(folder / LABELS, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder / LABELS}: labels are missing or unreadable ({error}); pack again") from None
        if labels.shape != (manifest["count"],) or labels.dtype != np.int64:
            raise InputError(f"{folder / LABELS} holds {labels.dtype} {labels.shape}, not {manifest['count']} labels")
    return PackedRows(folder, manifest), labels, Names(folder / NAMES, manifest["count"])


def _check_moments_shape(shape, spec, folder):
    if len(shape) == 3 and shape[0] == 2 * spec.channels and shape[1] == shape[2]:
        return
    if len(shape) == 3 and shape[0] == spec.channels:
        raise InputError(
            f"{folder}: latents have {shape[0]} channels; {2 * spec.channels} are needed: mean and std of the VAE "
            "posterior, sampled afresh at every step. Already sampled latents cannot be used: encode the images again"
        )
    raise InputError(
        f"{folder}: latents have shape {shape}; ({2 * spec.channels}, h, h) is needed for VAE {spec.vae}; "
        "encode again, or name the right VAE with --data-vae"
    )


def _count_classes(folder, manifest, labels, num_classes):
    recorded = manifest.get("num_classes") if manifest else None
    if recorded is not None:
        if num_classes not in (None, recorded):
            raise InputError(f"--num-classes {num_classes}: {folder / MANIFEST} says {recorded}; leave the flag out")
        return recorded
    if num_classes is not None:
        return num_classes
    classes = int(labels.max()) + 1
    note(f"{folder} does not say how many classes it has: {classes} (largest label + 1; otherwise --num-classes)")
    return classes


def _open_mirror(data_dir, info):
    folder = Path(data_dir) / MIRROR
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; encode it with preprocessing/dataset_tools.py mirror")
    manifest, rows, _, _ = open_set(folder)
    if len(rows) != info.count or rows.shape != info.moments_shape:
        raise InputError(f"{folder} holds {len(rows)} of {rows.shape}, not {info.count} of {info.moments_shape}")
    if manifest is not None:
        info.spec.check_same(spec_from_manifest(manifest, folder), MOMENTS, str(folder))
    return rows


def open_images(data_dir, folder, names, info):
    """ImageFiles of the moments in `folder`. Raises InputError."""
    root = next((f for f in (Path(data_dir) / IMAGES, folder.parent / IMAGES) if f.is_dir()), None)
    if root is None:
        raise InputError(f"{Path(data_dir) / IMAGES} is missing and images are needed; link the converted images there")
    check_pairs_are_known(folder, names)
    if names is None:  # published pairing: the i-th image file belongs to the i-th latent
        from PIL import Image

        Image.init()
        names = walk_files(root, Image.EXTENSION.keys())
        if len(names) != info.count:
            raise InputError(
                f"{root} holds {len(names)} images for {info.count} latents, and without a {MANIFEST} they are paired "
                f"by order; remove the stray files; {CHECK}"
            )
    return ImageFiles(root, names.__getitem__, info.resolution)


def check_pairs_are_known(folder, names):
    """Raise InputError where a set of moments names latents instead of the images that they were made from."""
    if names is not None and names[0].endswith(".npy"):
        raise InputError(f"{folder} was packed without the images beside it, so pairs are unknown; pack again")


# -------------------------------------------------------------------------------------------------------- features


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What the features must share with the moments in `folder`: the image set, names (or None: by order), count."""

    folder: Path
    images: str | None
    names: Names | None
    count: int


def image_set(manifest):
    """Fingerprint of the images that a set was made from, or None where its manifest does not say."""
    manifest = manifest or {}
    job = manifest.get("job") or {}
    return manifest.get("images") or (job.get("source") if job.get("command") == "encode" else None)


def find_features(data_dir, name):
    """Folder of the features of an encoder, `features-NAME` beside the moments; None where there is none."""
    try:
        place = find_set(data_dir, MOMENTS).parent / f"{FEATURES}{name}"
    except InputError:  # what is wrong is said where the moments are opened
        return None
    return place if place.is_dir() else None


def open_features(data_dir, encoders, pairing, mirror=False):
    """{encoder: StoredRows} of the features of these encoders. Raises InputError where they do not fit the moments."""
    return {name: _open_features(find_features(data_dir, name), name, pairing, mirror) for name in encoders}


def _open_features(place, name, pairing, mirror):
    """StoredRows of the features of encoder `name`, and of the mirrored images' where `mirror`."""
    rows = _open_feature_set(place, name, pairing, flipped=False)
    twin = place.with_name(place.name + "-mirror")
    if mirror and not twin.is_dir():
        raise InputError(
            f"--mirror: {twin} is missing; write it with preprocessing/dataset_tools.py features --mirror, or move "
            f"{place} away to compute features while training"
        )
    return StoredRows(rows, _open_feature_set(twin, name, pairing, flipped=True) if mirror else None)


def _open_feature_set(place, name, pairing, flipped):
    manifest, rows, _, names = open_set(find_set(place, "."))
    manifest = manifest or {}
    encoder = manifest.get("encoder")
    facts = {
        "encoder": (encoder.get("name") if isinstance(encoder, dict) else encoder, name),
        "flipped images": (manifest.get("flipped"), flipped),
        "number of images": (len(rows), pairing.count),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise InputError(
                f"{place}: its {what} is {found}, not {expected}; write the features again, or move it away"
            )
    check_pairs_are_known(pairing.folder, pairing.names)
    other = image_set(manifest)
    if pairing.images not in (None, other) or (pairing.names is not None and not pairing.names.same(names)):
        raise InputError(
            f"{place} holds features of other images than {pairing.folder} was made from; write the features again, "
            "or move it away"
        )
    return rows


# --------------------------------------------------------------------------------------------- sampler and loader


class SeekableSampler:
    """Data order as a pure function of (seed, epoch, position); any step is found at once.

    The last incomplete batch of an epoch is dropped. World size plays no part: a rank takes its rows of each batch.
    """

    def __init__(self, count, batch_size, seed):
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: at least 1")
        if count < batch_size:
            raise InputError(f"--batch-size {batch_size}: the data holds only {count} images; take {count} or fewer")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        self._order, self._coins = (None, None), (None, None)  # of the last epoch asked for

    def batch(self, step):
        """Indices of global batch `step` (from 0): int64 (batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        known, order = self._order  # one read: the loader's thread may be in another epoch
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(self.count).astype(np.int64, copy=False)
            self._order = (epoch, order)
        return order[position * self.batch_size : (position + 1) * self.batch_size].copy()

    def flips(self, step):
        """Which rows of global batch `step` come from the mirrored set: bool (batch_size,), one fair coin per image."""
        epoch = step // self.steps_per_epoch
        known, coins = self._coins
        if known != epoch:
            coins = np.random.default_rng([self.seed, epoch, 2]).random(self.count) < 0.5
            self._coins = (epoch, coins)
        return coins[self.batch(step)]

    def uniforms(self, step):
        """A number in [0, 1) for each row of global batch `step`, float64 (batch_size,); it chooses captions."""
        return np.random.default_rng([self.seed, step, 3]).random(self.batch_size)


class LatentLoader:
    """Batches of steps start_step … stop_step − 1, gathered in a background thread while the step before runs.

    rows: positions of the global batch that this rank takes (default: all); stop_step None: no end; depth: batches
    held ready. Errors of the thread are raised at the consumer; leaving the loop ends the thread.
    """

    def __init__(self, dataset, sampler, rows=None, start_step=0, stop_step=None, device="cpu", depth=2):
        self.dataset, self.sampler, self.device = dataset, sampler, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rows = np.arange(sampler.batch_size) if rows is None else np.asarray(rows)
        self.start_step, self.stop_step, self.depth = start_step, stop_step, depth

    def __iter__(self):
        ready, stop = queue.Queue(self.depth), threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop), name="latent-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._receive(*item)
        finally:
            stop.set()
            while thread.is_alive():
                _take_all(ready)
                thread.join(0.01)

    def _fill(self, ready, stop):
        """Thread: put batches, then None, or the exception that ended it."""
        try:
            stream = None
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread starts on GPU 0, and pinning would claim memory there
                stream = torch.cuda.Stream(self.device)
            step = self.start_step
            while not stop.is_set() and (self.stop_step is None or step < self.stop_step):
                _put(ready, self._gather(step, stream), stop)
                step += 1
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _gather(self, step, stream):
        tensors = self.dataset.gather_step(self.sampler, step, self.rows, pin=stream is not None)
        if stream is None:
            return step, tensors, None
        with torch.cuda.stream(stream):  # a stream of its own, so that the copy runs beside the training step
            tensors = [None if t is None else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return step, tensors, stream.record_event()

    def _receive(self, step, tensors, copied):
        """Consumer: order the copy before what follows on this stream."""
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(here)
        tensors = [t if t is None or copied is not None else t.to(self.device) for t in tensors]
        return Batch(step, *tensors[:3], tuple(tensors[3:]))


def _put(ready, item, stop):
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


def _take_all(ready):
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
