"""The flags of dataset_tools.py: what several commands share, then each command's."""

import dataclasses
import re
from typing import ClassVar

from common.flags import BATCH, CLASSES, WORKERS, FlagTextError, Range, flag, required
from models.flags import ENCODERS
from models.specs import DEFAULT_TEXT_ENCODER, DEFAULT_VAE

BATCHES, SPEED = "--per-proc-batch-size", "precision and speed"  # name and group of flags
DTYPES = ["bf16", "fp16", "fp32"]
TRANSFORMS = ["center-crop", "center-crop-dhariwal", "center-crop-wide", "resize"]
STORED = {"fp16": "<f2", "fp32": "<f4"}


@dataclasses.dataclass
class SetFlags:
    """What is read and what is made."""

    source: str = required("images that convert wrote (DATA/images)", metavar="DIR|ZIP", group="data")
    dest: str = required("new or empty folder", metavar="DIR", group="output")
    _: dataclasses.KW_ONLY
    max_images: int | None = flag(None, "only the first N in order", int, range=Range(low=1), metavar="N", group="data")


@dataclasses.dataclass(kw_only=True)
class ImageFlags(SetFlags):
    """How images are read."""

    skip_bad: bool = flag(False, "list and leave out unreadable images instead of stopping", group="data")
    published_labels: bool = flag(False, "a file in the root is a class, as published: the first one", group="data")


@dataclasses.dataclass(kw_only=True)
class StoredFlags:
    """How packed rows are stored."""

    stored_dtype: str = flag("fp16", "type of packed rows", choices=sorted(STORED), group="output")
    shard_size: int = flag(65536, "rows per shard", range=Range(low=1), group="output")  # 1 GiB of fp16 8×32×32

    def stored(self):
        return {"stored": self.stored_dtype, "shard_size": self.shard_size}


@dataclasses.dataclass(kw_only=True)
class NetworkFlags(StoredFlags):
    """How a network computes the rows."""

    batch_size: int = flag(16, "images per batch and process", range=BATCH, group=SPEED, name=BATCHES)
    workers: int = flag(4, "threads that read images", range=WORKERS, group=SPEED, name="--num-workers")
    device: str | None = flag(None, "cuda or cpu; default: cuda if present", str, group=SPEED)


def width_height(text):
    """'256x256' or '256,256' → (256, 256)."""
    match = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", text)
    if not match or 0 in (size := tuple(map(int, match.groups()))):
        raise FlagTextError(f"{text!r} is not WIDTHxHEIGHT, for example 256x256")
    return size


@dataclasses.dataclass
class ConvertFlags(ImageFlags):
    """images of any size → square RGB images of one size"""

    source: str = required("class folders, or a zip of them; also ZIP:FOLDER", metavar="DIR|ZIP", group="data")
    dest: str = required("new or empty folder, or a .zip to make", metavar="DIR|ZIP", group="output")
    resolution: tuple | None = flag(None, "for example 256x256", width_height, metavar="WxH", group="output")
    transform: str | None = flag(None, f"default: {TRANSFORMS[1]}", str, choices=TRANSFORMS, group="output")
    _: dataclasses.KW_ONLY
    format: str = flag("png", "jpeg loses detail", choices=["jpeg", "png", "webp-lossless"], group="output")
    workers: int | None = flag(
        None, "processes; default: one per core", int, range=WORKERS, group=SPEED, name="--num-workers"
    )


def normalize_flag():
    """--normalize"""
    words = "measure a scale and shift per channel, for latents with mean 0 and std 1; default: the VAE's"
    return flag(None, words, str, choices=["per-channel"], group="output")


@dataclasses.dataclass
class MirrorFlags(NetworkFlags, ImageFlags):
    """encode the horizontally flipped images, as a second set beside the first (DATA/vae-sd-mirror)"""

    mirror: ClassVar = True
    normalize: ClassVar = None  # training scales both sets like the first
    vae: str = flag(DEFAULT_VAE, "name or folder", also=("--model-url",), group="model")
    _: dataclasses.KW_ONLY
    dtype: str = flag("fp32", "of the VAE; GPUs convolve fp32 in TF32, as published", choices=DTYPES, group=SPEED)
    packed: bool = flag(False, "write memory-mapped shards instead of a file per image", group="output")


@dataclasses.dataclass(kw_only=True)
class EncodeFlags(MirrorFlags):
    """converted images → moments (mean and std) of a VAE; also under torchrun"""

    mirror: ClassVar = False
    normalize: str | None = normalize_flag()


@dataclasses.dataclass
class FeatureFlags(NetworkFlags, ImageFlags):
    """patch features of an alignment encoder as a packed set, so that training needs no encoder"""

    enc_type: str = required(f"one of {ENCODERS}", metavar="NAME", group="model")
    enc_ckpt: str | None = flag(None, "authors' or timm's weights; default: hub", str, metavar="FILE", group="model")
    _: dataclasses.KW_ONLY
    mirror: bool = flag(False, "of the flipped images (DATA/features-NAME-mirror)", group="data")


@dataclasses.dataclass
class PackFlags(StoredFlags):
    """moments of either layout → memory-mapped shards with checksums"""

    source: str = required("data folder, or one set of it", metavar="DIR", group="data")
    dest: str = required("new or empty folder of the same kind", metavar="DIR", group="output")
    _: dataclasses.KW_ONLY
    vae: str | None = flag(None, "the VAE of a source without a manifest", str, group="data")
    num_classes: int | None = flag(None, "classes of such a source", int, range=CLASSES, group="data")
    normalize: str | None = normalize_flag()
    workers: int = flag(8, "threads that read files", range=WORKERS, group=SPEED, name="--num-workers")


@dataclasses.dataclass
class CaptionFlags(StoredFlags, SetFlags):
    """captions of the images → features of a text encoder, as a packed set with the captions beside it"""

    annotations: str = required("COCO's captions, or {file name: [captions]}", metavar="JSON", group="data")
    text_encoder: str = flag(DEFAULT_TEXT_ENCODER, "name or folder", group="model")
    _: dataclasses.KW_ONLY
    batch_size: int = flag(64, "captions per batch and process", range=BATCH, group=SPEED, name=BATCHES)
    device: str | None = flag(None, "cuda or cpu; default: cuda if present", str, group=SPEED)


@dataclasses.dataclass
class VerifyFlags:
    """is everything there and right? Prints the first fault of each kind; exit code 1 if there is any"""

    data_dir: str = required("data folder, or one set of it", metavar="DIR", positional=True)
    vae: str | None = flag(None, "compare with this VAE, and encode 64 of the images again", str)
    decode: bool = flag(False, "read every image whole, not only its header")


@dataclasses.dataclass
class InfoFlags:
    """what the manifest says, in ten lines"""

    data_dir: str = required("data folder, or one set of it", metavar="DIR", positional=True)
    grid: str | None = flag(None, "also decode 64 latents into this picture", str, metavar="PNG", name="--out")
    vae: str | None = flag(None, "VAE of the picture; default: the recorded one", str)
