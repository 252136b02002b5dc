"""The data manifest: `manifest.json` in a folder of images, moments, features or captions says what the set holds.

A set is either in the folder layout (one file per image and `dataset.json`) or packed (memory-mapped shards).
docs/data.md shows both. preprocessing/ writes manifests, as the last file of a set.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from common.errors import InputError
from common.files import read_bytes
from common.flags import CLASSES
from common.records import Count, FileName, Whole, parse_record
from models.specs import LatentSpec, TextSpec

MANIFEST = "manifest.json"
LABELS_JSON = "dataset.json"  # folder layout: {"labels": [[name, label], …]}
LABELS = "labels.npy"  # packed layout: int64 (N,)
NAMES = "names.txt"  # source name of every row, lines padded to one width, so that row i is found without reading
FORMAT = "deepflow-data"
VERSION = 1
MAX_CLASSES = CLASSES.high
MOMENTS, MIRROR, IMAGES, TEXT = "vae-sd", "vae-sd-mirror", "images", "text"
PREPARE = "prepare it with preprocessing/dataset_tools.py"
CHECK = "python preprocessing/dataset_tools.py verify lists what is wrong"
AGAIN = "restore it, or make the set again"
ENCODERS = {"latents": LatentSpec, "text": TextSpec}  # manifest entries that identify the encoder


@dataclasses.dataclass(frozen=True)
class EncoderRecord:
    """The encoder that made a set of features: its name, and the id of its weights."""

    name: str
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of `count` raw rows."""

    file: FileName
    count: Count
    sha256: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What every manifest of this project says, whatever its version."""

    format: str = ""
    version: Whole = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataManifest(Header):
    """What manifest.json says of a set; None (or an empty tuple) for what it does not say. Unknown keys are ignored."""

    path: Path | None = None  # of manifest.json, for messages
    count: Whole  # rows, or images
    kind: Literal["images", "moments", "features", "captions"] | None = None
    layout: Literal["folder", "packed"] = "folder"
    num_classes: Count | None = None
    class_names: tuple[str, ...] | None = None
    resolution: Count | None = None  # side of the images
    transform: str | None = None
    image_format: str | None = None
    latents: LatentSpec | None = None  # of moments
    text: TextSpec | None = None  # of captions
    encoder: EncoderRecord | None = None  # of features
    arithmetic: str | None = None  # dtype of the VAE that computed them; GPUs convolve fp32 in TF32
    flipped: bool | None = None  # made of mirrored images
    moments_shape: tuple[Count, ...] | None = None  # (2C, h, w)
    shape: tuple[Count, ...] | None = None  # of a packed row
    dtype: Literal["<f2", "<f4", "<f8"] | None = None
    shard_size: Count | None = None  # rows of every shard but the last
    shards: tuple[Shard, ...] = ()
    files: dict[FileName, str] = dataclasses.field(default_factory=dict)  # {name: sha256} of other files
    images: str | None = None  # fingerprint of the images
    image_count: Count | None = None  # of captions: images that they describe
    left_out: tuple[tuple[str, str], ...] = ()  # ((image name, reason), …)
    versions: dict = dataclasses.field(default_factory=dict)
    job: dict = dataclasses.field(default_factory=dict)  # what the command was asked to do

    @classmethod
    def read(cls, folder):
        """The manifest of a set, or None where there is none. Raises InputError naming file and key."""
        path = Path(folder) / MANIFEST
        return cls.parse(read_bytes(path, AGAIN), path) if path.is_file() else None

    @classmethod
    def parse(cls, data, path):
        """The manifest in the bytes `data` of the file `path`. Raises InputError naming file and key."""
        header = parse_record(Header, data, path, AGAIN)
        if header.format != FORMAT:
            raise InputError(f"{path} is not a manifest of this project; move it away, or {PREPARE}")
        if header.version > VERSION:
            raise InputError(f"{path} has format version {header.version}; this code reads {VERSION}: update the code")
        manifest = dataclasses.replace(parse_record(cls, data, path, AGAIN), path=Path(path))
        if manifest.kind != "captions" and (manifest.num_classes or 0) > MAX_CLASSES:  # those count the images
            raise InputError(f"{path}: 'num_classes' is {manifest.num_classes}, above {MAX_CLASSES}; {AGAIN}")
        if manifest.is_packed:
            manifest._check_shards()
        return manifest

    @property
    def is_packed(self):
        return self.layout == "packed"

    @property
    def image_set(self):
        """Fingerprint of the images that the set was made from, or None where the manifest does not say."""
        return self.images or (self.job.get("source") if self.job.get("command") == "encode" else None)

    def moments_spec(self):
        """The LatentSpec of a set of moments. Raises InputError for a set of another kind."""
        if self.latents is not None:
            return self.latents
        if self.kind == "moments":
            raise InputError(f"{self.path} does not say which VAE made the latents; encode again")
        raise InputError(f"{self.path.parent} holds {self.kind or 'no'} data, not VAE moments; encode it first")

    def _check_shards(self):
        """Raise InputError unless the set has all that a packed one needs, and shards of `count` rows."""
        for name in ("shape", "dtype", "shard_size", "files"):
            if not getattr(self, name):
                raise InputError(f"{self.path} lacks {name!r}; restore it, or pack the set again")
        counts = [shard.count for shard in self.shards]
        if sum(counts) != self.count or any(count != self.shard_size for count in counts[:-1]):
            raise InputError(f"{self.path}: 'shards' do not add up to {self.count}, {self.shard_size} each; pack again")
