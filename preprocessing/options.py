"""Flags that several commands share, as dataclasses to inherit from."""

import dataclasses

from common.flags import BATCH, WORKERS, Range, flag, required

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

    batch_size: int = flag(16, "images per batch and process", range=BATCH, group="precision and speed")
    workers: int = flag(4, "threads that read images", range=WORKERS, group="precision and speed")
    device: str | None = flag(None, "cuda or cpu; default: cuda if present", str, group="precision and speed")
