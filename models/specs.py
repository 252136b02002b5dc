"""What manifests and checkpoints say of models and encoders, as plain data."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.flags import ROOT
from common.records import Count, Finite, Positive
from models.identity import Identity

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14"
# What of a run's configuration bears on its numbers, beside the model; exported folders and samples' manifests keep it.
TRAINING = ("batch_size", "learning_rate", "adam_beta2", "ema_decay", "cfg_prob", "weighting", "tg_upper_bound")
TRAINING += ("scale_weight", "acc_coeff", "ssl_align", "enc_type", "proj_coeff", "g_type", "omega", "g_min", "g_max")
TRAINING += ("changes", "init_from")
Size = Annotated[int, Field(ge=1, le=1 << 20)]  # a larger one would only fail on allocation
Word = Annotated[str, Field(max_length=100)]
Options = dict[str, Size | bool | Word | Annotated[list[Size], Field(max_length=1000)] | None]  # constructor arguments


def vae_family(name):
    """Name of the encoder family of a VAE; sd-vae-ft-ema and -mse share their encoder."""
    if any(re.fullmatch(r"(.*--)?sd-vae-ft-(ema|mse)", part) for part in Path(str(name)).parts):  # also in a hub cache
        return LatentSpec.family
    return Path(str(name)).name


def resolve_vae(name):
    """Full name of a VAE: a short name (`ema`, `mse`), a hub id, or a folder (also relative to the repository).

    For the folder of a whole pipeline, its subfolder `vae`.
    """
    name = SHORT_NAMES.get(str(name), str(name))
    folder = next((folder for folder in (Path(name), ROOT / name) if folder.is_dir()), None)
    is_pipeline = folder and not (folder / "config.json").exists() and (folder / "vae/config.json").is_file()
    return str(folder / "vae" if is_pipeline else folder or name)


def encoder_family(name):
    """Last part of a text encoder's name or folder; for a folder in a hub cache, of its name on the hub."""
    parts = Path(str(name)).parts
    cached = [part for part in parts if re.fullmatch(r"models--.+--.+", part)]
    return cached[-1].split("--")[-1] if cached else Path(str(name)).name


@dataclasses.dataclass(frozen=True)
class LatentSpec(Identity):
    """What a set of latents was made with; travels in the data manifest and in the checkpoint."""

    KIND, NAME, FLAG, SETTINGS = "VAE", "vae", "--vae", ("scale", "shift", "channels")

    vae: str = DEFAULT_VAE
    family: str = "sd-vae-ft"
    scale: Positive | tuple[Positive, ...] = 0.18215  # of all channels, or of each: 1/std of the data's latents
    shift: Finite | tuple[Finite, ...] = 0.0
    channels: Count = 4
    factor: Count = 8
    encoder_sha256: str | None = None  # of the encoder's weights, which sd-vae-ft-ema and -mse share
    decoder_sha256: str | None = None  # of the decoder's weights

    def __post_init__(self):
        for value in (self.scale, self.shift):
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(f"scale or shift has {len(value)} numbers for {self.channels} channels")

    @property
    def normalization(self):
        """Scale and shift, in words."""
        return "a scale per channel" if isinstance(self.scale, tuple) else f"scale {self.scale}"

    def scaled_as(self, data):
        """A VAE's spec with the scale and shift of the LatentSpec `data`, if these were measured per channel."""
        if not isinstance(data.scale, tuple) or data.channels != self.channels:
            return self
        return dataclasses.replace(self, scale=data.scale, shift=data.shift)

    def sample(self, moments, noise):
        """The network's latents (mean + std·ε − shift)·scale, (N, C, h, w): moments (N, 2C, h, w), ε (N, C, h, w)."""
        mean, std = moments.chunk(2, dim=1)
        z = mean + std * noise
        return (z - _broadcast(self.shift, z)) * _broadcast(self.scale, z)

    def restore(self, latents):
        """The decoder's input for network latents (N, C, h, w)."""
        return latents / _broadcast(self.scale, latents) + _broadcast(self.shift, latents)


def _broadcast(value, like):
    """A number as it is; one for each channel as a tensor for arithmetic with `like`, (N, C, h, w)."""
    return _on_device(value, like.dtype, like.device) if isinstance(value, tuple) else value


@functools.lru_cache  # a copy in every step would wait for the device
def _on_device(values, dtype, device):
    import torch  # flags are declared without

    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


@dataclasses.dataclass(frozen=True)
class TextSpec(Identity):
    """What a set of text features was made with; travels in the data manifest and in the checkpoint."""

    KIND, NAME, FLAG, SETTINGS = "text encoder", "encoder", "--text-encoder", ("tokens", "width")

    encoder: str = DEFAULT_TEXT_ENCODER
    family: str = encoder_family(DEFAULT_TEXT_ENCODER)
    tokens: Count = 77
    width: Count = 768
    encoder_sha256: str | None = None  # of the network and its tokenizer
