"""The latent codec: the one place that knows the VAE, its scale and its shift.

Letters: N batch, C latent channels, h = w latent size, f downsampling factor of the VAE, R = f·h image size.
"Moments" are mean and std of the VAE posterior, concatenated on the channel axis: (N, 2C, h, w).
"""

import dataclasses

import torch

from common.errors import InputError
from common.records import Count, Finite, Positive, check_record
from models.hub import fetching
from models.identity import check_complete, content_sha256, variant_of
from models.specs import DEFAULT_VAE, SHORT_NAMES, LatentSpec, resolve_vae, vae_family

REMEDY = "name a VAE with a scaling_factor above 0, and with both or none of latents_mean and latents_std"


@dataclasses.dataclass
class VaeConfig:
    """The entries of a diffusers `AutoencoderKL`'s config.json that are used."""

    scaling_factor: Positive
    latent_channels: Count
    block_out_channels: list[Count]
    shift_factor: Finite | None = None
    latents_mean: tuple[Finite, ...] | None = None  # of each channel; scaling_factor multiplies what they normalize
    latents_std: tuple[Positive, ...] | None = None

    def normalization(self, name):
        """Scale and shift of a LatentSpec. Raises InputError for statistics of other channels."""
        statistics = {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        given = {key: value for key, value in statistics.items() if value is not None}
        if not given:
            return self.scaling_factor, self.shift_factor or 0.0
        if [len(value) for value in given.values()] != [self.latent_channels] * 2:
            fault = f"'{next(iter(given))}' and its counterpart must have {self.latent_channels} numbers each"
            raise InputError(f"--vae {name}: config.json: {fault}; {REMEDY}")
        return tuple(self.scaling_factor / std for std in self.latents_std), self.latents_mean


def to_uint8(images):
    """(N, 3, R, R) in [−1, 1] → uint8 (N, R, R, 3): (x + 1)·127.5, clamped, cast (the release truncates)."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class LatentCodec:
    """A VAE with its spec: images ↔ moments ↔ latents."""

    def __init__(self, vae, spec):
        self.vae = vae.eval().requires_grad_(False)
        self.spec = spec

    @classmethod
    def load(cls, name=DEFAULT_VAE, device="cpu", dtype=torch.float32):
        """Load a diffusers `AutoencoderKL` by name or folder. Raises InputError if that fails."""
        from diffusers import AutoencoderKL  # takes seconds, and training without grids never needs it

        name, place = SHORT_NAMES.get(str(name), str(name)), resolve_vae(name)
        with fetching(f"the VAE '{name}'", place, "pass --vae with a folder that holds a diffusers AutoencoderKL"):
            options = {"torch_dtype": torch.float32, "variant": variant_of(place), "output_loading_info": True}
            vae, loading_info = AutoencoderKL.from_pretrained(place, **options)
            check_complete(loading_info, f"the VAE '{name}'")
        config = check_record(VaeConfig, dict(vae.config), f"--vae {name}: config.json", REMEDY)
        scale, shift = config.normalization(name)
        facts = {key: vae.config[key] for key in ("act_fn", "norm_num_groups")}
        spec = LatentSpec(
            vae=name,
            family=vae_family(name),
            scale=scale,
            shift=shift,
            channels=config.latent_channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            encoder_sha256=content_sha256(vae, ("encoder.", "quant_conv."), facts),
            decoder_sha256=content_sha256(vae, ("decoder.", "post_quant_conv."), facts),
        )
        for part in vae.children():  # diffusers warns if the whole model is given a dtype
            part.to(device, dtype)
        if dtype != torch.float32:  # the layout of fast GPU convolutions; float32 keeps its rounding
            vae.decoder.to(memory_format=torch.channels_last)
        return cls(vae, spec)

    def fit(self, spec, whose):
        """The codec for latents with this LatentSpec; whose: for the message. Raises InputError for another VAE's."""
        fitting = self.spec.scaled_as(spec)
        spec.check_same(fitting, whose, "--vae")
        return LatentCodec(self.vae, fitting)

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, 3, R, R) → moments, float32 (N, 2C, h, w), neither sampled nor scaled."""
        x = images.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def decode(self, latents, chunk=32):
        """Network latents (N, C, h, w) → uint8 images (N, R, R, 3), `chunk` at a time to bound memory.

        Raises InputError if values overflow in the decoder's precision.
        """
        images, is_finite = self.start_decoding(latents, chunk)
        self.check(is_finite)
        return images

    @torch.no_grad()
    def start_decoding(self, latents, chunk=32):
        """The images of `decode`, and a 0-d bool tensor for `check`: all values are finite. Does not wait for a GPU."""
        z, images, finite = self.spec.restore(latents.to(self.vae.device)), [], []
        for part in z.split(chunk):
            decoded = self.vae.decode(part.to(self.vae.dtype)).sample
            finite.append(decoded.isfinite().all())
            images.append(to_uint8(decoded))
        return torch.cat(images), torch.stack(finite).all()

    def check(self, is_finite):
        """Raise InputError if decoded values overflowed."""
        if not is_finite:
            name, dtype = self.spec.vae, self.vae.dtype
            raise InputError(f"the VAE {name} gives pixels that are not finite in {dtype}; use fp32")
