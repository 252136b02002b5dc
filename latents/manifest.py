"""The data manifest: `manifest.json` in a folder of images, moments, features or captions says what the set holds.

    manifest = DataManifest.read("DATA/vae-sd")  # None where there is no manifest.json
    manifest.latents.scale

A set is either in the folder layout (one file per image and `dataset.json`) or packed (memory-mapped shards).
docs/data.md shows both. preprocessing/ writes manifests, as the last file of a set.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from common.errors import InputError
from models.codec import LatentCodec, LatentSpec, resolve_vae, vae_family
from models.text import TextSpec

MANIFEST = "manifest.json"
LABELS_JSON = "dataset.json"  # folder layout: {"labels": [[name, label], …]}
LABELS = "labels.npy"  # packed layout: int64 (N,)
NAMES = "names.txt"  # source name of every row, lines padded to one width, so that row i is found without reading
PARTIAL = ".partial"  # folder in a set that is not finished
FORMAT = "deepflow-data"
VERSION = 1
MOMENTS, MIRROR, IMAGES, FEATURES = "vae-sd", "vae-sd-mirror", "images", "features-"
PREPARE = "prepare it with preprocessing/dataset_tools.py"
CHECK = "python preprocessing/dataset_tools.py verify lists what is wrong"
PACKED_KEYS = ("shape", "dtype", "shard_size", "shards", "files")  # what a manifest of the packed layout must have


# ------------------------------------------------------------------------------------ readers of one key's JSON value


def string(value):
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def boolean(value):
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def mapping(value):
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def one_of(*choices):
    """Reader of one of these texts."""

    def read(value):
        if value not in choices:
            raise ValueError(" or ".join(map(repr, choices)))
        return value

    return read


def whole(least):
    """Reader of a whole number from `least`."""

    def read(value):
        if type(value) is not int or value < least:
            raise ValueError(f"a whole number from {least}")
        return value

    return read


def number(value):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def positive(value):
    if number(value) <= 0:
        raise ValueError("a number above 0")
    return value


def float_type(value):
    try:
        dtype = np.dtype(string(value))
    except TypeError:
        dtype = np.dtype(bool)
    if dtype.kind != "f":
        raise ValueError("a type of floating-point numbers, such as '<f2'")
    return value


def tuple_of(item):
    """Reader of a list whose items `item` reads."""

    def read(value):
        if not isinstance(value, list):
            raise ValueError("a list")
        try:
            return tuple(map(item, value))
        except ValueError as error:
            raise ValueError(f"a list, each item {error}") from None

    return read


def object_of(cls, **readers):
    """Reader of an object as the dataclass `cls`; readers: those of its keys. Keys without a reader are ignored."""

    def read(value):
        try:
            return cls(**{key: readers[key](item) for key, item in mapping(value).items() if key in readers})
        except ValueError as error:
            keys = ", ".join(readers)
            raise ValueError(f"an object with {keys} ({error})") from None
        except TypeError:
            raise ValueError(f"an object with {', '.join(readers)}") from None

    return read


def name_and_reason(value):
    """[image name, reason] of an image that was left out."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("a pair of texts")
    return tuple(map(string, value))


def file_name(value):
    if Path(string(value)).name != value:
        raise ValueError("the name of a file in this folder")
    return value


def key(read, default=None):
    """A field of DataManifest; read: JSON value → field value, or ValueError with what is expected."""
    return dataclasses.field(default=default, metadata={"read": read})


# ------------------------------------------------------------------------------------------------------- the manifest


@dataclasses.dataclass(frozen=True)
class EncoderRecord:
    """The encoder that made a set of features: its name, and the id of its weights."""

    name: str
    weights: str | None = None


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of `count` raw rows."""

    file: str
    count: int
    sha256: str


read_latents = object_of(
    LatentSpec, vae=string, family=string, scale=positive, shift=number, channels=whole(1), factor=whole(1)
)
read_text = object_of(TextSpec, encoder=string, family=string, tokens=whole(1), width=whole(1))
read_encoder = object_of(EncoderRecord, name=string, weights=string)
read_shard = object_of(Shard, file=file_name, count=whole(1), sha256=string)


@dataclasses.dataclass(frozen=True)
class DataManifest:
    """What manifest.json says of a set; None (or an empty tuple) for what it does not say. Unknown keys are ignored."""

    path: Path  # of manifest.json, for messages
    version: int = key(whole(0), 0)
    count: int = key(whole(0))  # rows, or images
    kind: str | None = key(one_of("images", "moments", "features", "captions"))
    layout: str = key(one_of("folder", "packed"), "folder")
    num_classes: int | None = key(whole(1))
    class_names: tuple | None = key(tuple_of(string))
    resolution: int | None = key(whole(1))  # side of the images
    transform: str | None = key(string)
    image_format: str | None = key(string)
    latents: LatentSpec | None = dataclasses.field(default=None, metadata={"read": read_latents})  # of moments
    text: TextSpec | None = dataclasses.field(default=None, metadata={"read": read_text})  # of captions
    encoder: EncoderRecord | None = dataclasses.field(default=None, metadata={"read": read_encoder})  # of features
    arithmetic: str | None = key(string)  # dtype in which the VAE computed
    flipped: bool | None = key(boolean)  # made of mirrored images
    moments_shape: tuple | None = key(tuple_of(whole(1)))  # (2C, h, w)
    shape: tuple | None = key(tuple_of(whole(1)))  # of a packed row
    dtype: str | None = key(float_type)
    shard_size: int | None = key(whole(1))  # rows of every shard but the last
    shards: tuple = key(tuple_of(read_shard), ())
    files: dict = dataclasses.field(default_factory=dict, metadata={"read": mapping})  # {name: sha256} of other files
    images: str | None = key(string)  # fingerprint of the images
    image_count: int | None = key(whole(1))  # of captions: images that they describe
    left_out: tuple = key(tuple_of(name_and_reason), ())  # ((image name, reason), …)
    versions: dict = dataclasses.field(default_factory=dict, metadata={"read": mapping})
    job: dict = dataclasses.field(default_factory=dict, metadata={"read": mapping})  # what the command was asked to do

    @classmethod
    def read(cls, folder):
        """The manifest of a set, or None where there is none. Raises InputError naming file and key."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            return None
        try:
            return cls.parse(path.read_bytes(), path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); restore it, or make the set again") from None

    @classmethod
    def parse(cls, data, path):
        """The manifest in the bytes `data` of the file `path`. Raises InputError naming file and key."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as JSON ({error}); restore it, or make the set again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not a manifest of this project; move it away, or {PREPARE}")
        version, *fields = dataclasses.fields(cls)[1:]
        if (found := _value(content, version, path)) > VERSION:
            raise InputError(f"{path} has format version {found}; this code reads {VERSION}: update the code")
        manifest = cls(Path(path), found, **{field.name: _value(content, field, path) for field in fields})
        manifest._check_shards(content)
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

    def _check_shards(self, content):
        """Raise InputError unless a packed set has all of its keys, and shards of `count` rows."""
        if not self.is_packed:
            return
        if missing := [name for name in PACKED_KEYS if content.get(name) is None]:
            raise InputError(f"{self.path} lacks {missing[0]!r}; restore it, or pack the set again")
        counts = [shard.count for shard in self.shards]
        if sum(counts) != self.count or any(count != self.shard_size for count in counts[:-1]):
            raise InputError(
                f"{self.path}: 'shards' do not add up to {self.count} rows in shards of {self.shard_size}; pack again"
            )


def _value(content, field, path):
    """Value of a field from the JSON object of a manifest."""
    value = content.get(field.name)
    if value is None:
        if field.name == "count":
            raise InputError(f"{path} lacks 'count'; restore it, or make the set again")
        return field.default if field.default is not dataclasses.MISSING else field.default_factory()
    try:
        return field.metadata["read"](value)
    except ValueError as error:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "…"
        raise InputError(
            f"{path}: {field.name!r} is {shown}, not {error}; restore the file, or make the set again"
        ) from None


def spec_of_vae(name):
    """LatentSpec of a VAE by name or folder; only families that are not known by name are loaded."""
    if vae_family(resolve_vae(name)) == LatentSpec.family and not Path(resolve_vae(name)).is_dir():
        return LatentSpec(vae=resolve_vae(name))
    return LatentCodec.load(name).spec
