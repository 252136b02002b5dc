"""What manifests and checkpoints record about models and encoders, as plain data."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.errors import InputError
from common.flags import ROOT
from common.records import Count, Finite, Positive, check_record, read_record
from models.identity import Identity, content_sha256

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
VAE_REMEDY = "name a VAE with a scaling_factor above 0 and with both or neither of latents_mean and latents_std"
DEFAULT_TEXT_ENCODER = "openai/clip-vit-large-patch14"
# Settings of a run that affect its weights, besides the model; exported folders and manifests of samples keep them.
TRAINING = ("batch_size", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
TRAINING += ("max_grad_norm", "ema_decay", "seed", "mixed_precision", "mirror", "holdout", "cfg_prob", "weighting")
TRAINING += ("tg_upper_bound", "scale_weight", "acc_coeff", "ssl_align", "enc_type", "proj_coeff", "deep_supervision")
TRAINING += ("g_type", "omega", "g_min", "g_max", "P_mean", "P_std", "P_mean_t", "P_std_t", "P_mean_r", "P_std_r")
TRAINING += ("changes", "init_from", "weights", "new_classes", "from_scratch", "teacher")
PLACES = ("init_from", "teacher", "holdout")  # those that may be paths
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
    scale: Positive | tuple[Positive, ...] = 0.18215  # one for all channels, or per channel (1/std of the latents)
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
        """The scale, in words."""
        return "a scale per channel" if isinstance(self.scale, tuple) else f"scale {self.scale}"

    def scaled_as(self, data):
        """A copy with the scale and shift of the LatentSpec `data` if those are per channel, else self."""
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
    """A number unchanged; a tuple of numbers per channel as a tensor that broadcasts to `like`, (N, C, h, w)."""
    return _on_device(value, like.dtype, like.device) if isinstance(value, tuple) else value


@functools.lru_cache  # copying it in every step would synchronise with the device
def _on_device(values, dtype, device):
    import torch  # here, as modules that declare flags import this one

    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


@dataclasses.dataclass
class VaeConfig:
    """The entries of a diffusers `AutoencoderKL`'s config.json that are used."""

    scaling_factor: Positive
    latent_channels: Count
    block_out_channels: list[Count]
    act_fn: str
    norm_num_groups: Count
    shift_factor: Finite | None = None
    latents_mean: tuple[Finite, ...] | None = None  # per channel; scaling_factor applies after normalization
    latents_std: tuple[Positive, ...] | None = None

    def normalization(self, name):
        """(scale, shift) of a LatentSpec. Raises InputError if statistics have another number of channels."""
        statistics = {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        given = {key: value for key, value in statistics.items() if value is not None}
        if not given:
            return self.scaling_factor, self.shift_factor or 0.0
        if [len(value) for value in given.values()] != [self.latent_channels] * 2:
            fault = f"'{next(iter(given))}' and its counterpart must have {self.latent_channels} numbers each"
            raise InputError(f"--vae {name}: config.json: {fault}; {VAE_REMEDY}")
        return tuple(self.scaling_factor / std for std in self.latents_std), self.latents_mean


def vae_spec(name, config, weights):
    """LatentSpec of a VAE from its config.json, a dict, and its weights {name: tensor or array}. Raises InputError."""
    config = check_record(VaeConfig, config, f"--vae {name}: config.json", VAE_REMEDY)
    scale, shift = config.normalization(name)
    facts = {"act_fn": config.act_fn, "norm_num_groups": config.norm_num_groups}
    name = SHORT_NAMES.get(str(name), str(name))
    return LatentSpec(
        vae=name,
        family=vae_family(name),
        scale=scale,
        shift=shift,
        channels=config.latent_channels,
        factor=2 ** (len(config.block_out_channels) - 1),
        encoder_sha256=content_sha256(weights, ("encoder.", "quant_conv."), facts),
        decoder_sha256=content_sha256(weights, ("decoder.", "post_quant_conv."), facts),
    )


def recognise_vae(name, spec):
    """LatentSpec of the VAE in a folder if it is the VAE of `spec`; None if it is not, or only loading it can tell.

    Imports neither torch nor diffusers. None for other file formats, old weight names or an incomplete config.json.
    """
    from safetensors.numpy import load_file

    folder = Path(resolve_vae(name))
    try:
        config = read_record(dict, folder / "config.json", "copy it again")
        found = vae_spec(name, config, load_file(folder / "diffusion_pytorch_model.safetensors"))
    except Exception:  # loading the VAE reports it
        return None
    return found if dataclasses.replace(found.scaled_as(spec), vae=spec.vae, family=spec.family) == spec else None


@dataclasses.dataclass(frozen=True)
class TextSpec(Identity):
    """What a set of text features was made with; travels in the data manifest and in the checkpoint."""

    KIND, NAME, FLAG, SETTINGS = "text encoder", "encoder", "--text-encoder", ("tokens", "width")

    encoder: str = DEFAULT_TEXT_ENCODER
    family: str = encoder_family(DEFAULT_TEXT_ENCODER)
    tokens: Count = 77
    width: Count = 768
    encoder_sha256: str | None = None  # of the network and its tokenizer
