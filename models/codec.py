"""The latent codec: the one place that knows the VAE, its scale and its shift.

Letters: N batch, C latent channels, h = w latent size, f downsampling factor of the VAE, R = f·h image size.
"Moments" are mean and std of the VAE posterior, concatenated on the channel axis: (N, 2C, h, w).
"""

import torch

from common.errors import InputError
from models.hub import fetching, load_complete
from models.identity import parameters_of
from models.specs import DEFAULT_VAE, resolve_vae, vae_spec


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

        place = resolve_vae(name)
        with fetching(f"the VAE '{name}'", place, "pass --vae with a folder that holds a diffusers AutoencoderKL"):
            vae = load_complete(AutoencoderKL, place, torch_dtype=torch.float32)
        spec = vae_spec(name, dict(vae.config), parameters_of(vae))
        for part in vae.children():  # diffusers warns if the whole model is given a dtype
            part.to(device, dtype)
        if dtype != torch.float32:  # the layout of fast GPU convolutions; float32 keeps its rounding
            vae.decoder.to(memory_format=torch.channels_last)
        return cls(vae, spec)

    def fit(self, spec, whose):
        """A codec for latents with this LatentSpec; whose: for the message. Raises InputError for another VAE."""
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
