"""Flags about models that several programs have, and what they may name."""

import dataclasses

from common.flags import Range, flag

ENCODERS = (  # of alignment, models/encoders.py
    "dinov2-vit-{s,b,l,g}, dinov2reg-vit-{s,b,l,g}, dinov1-vit-b, mocov3-vit-{s,b,l}, mae-vit-l, clip-vit-l, jepa-vit-h"
)
CONVENTIONS = ("repa", "sit")  # REPA, DeepFlow and Decoupled MeanFlow: t = 0 is data; SiT: t = 1 is data


@dataclasses.dataclass(kw_only=True)
class ConventionFlag:
    """The direction of time, for published files that leave it open."""

    convention: str | None = flag(
        None, "of a published file: t = 0 (repa) or t = 1 (sit) is data", str, choices=CONVENTIONS, group="model"
    )


@dataclasses.dataclass(kw_only=True)
class PublishedFlags(ConventionFlag):
    """Settings that published files may leave open; default: the file's, else its preset's."""

    df_idxs: list | None = flag(None, "blocks that end a branch: [8,16], 8,16 or 8 16", str, nargs="+", group="model")
    dmf_depth: int | None = flag(
        None, "number of blocks that see t, of a published flow map", int, range=Range(low=1), group="model"
    )
    legacy_scaling: bool | None = flag(None, "clamp the time-gap scale to [-5, 5], as published", bool, group="model")

    def published(self):
        """{name: value} of these flags, for load_checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(PublishedFlags)}
