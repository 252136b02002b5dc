"""Train a tiny KL autoencoder of 32×32 images, with downsampling factor 4: the quickstart's, or one for photographs.

    OMP_NUM_THREADS=1 python -m digits.train_vae --dest assets/tiny-vae
    OMP_NUM_THREADS=1 python -m digits.train_vae --data data/cifar10-source --steps 2400 --batch-size 8 --dest NEW

The first made assets/tiny-vae, in about six minutes on one CPU core, and makes it again byte for byte where torch's
arithmetic is the same (2.15, x86). The second made assets/cifar10-vae, in about ten. Both see training images
only. Letters: N batch, R = 32 image size, C latent channels.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import whole_folder, write_json
from common.flags import BATCH, SEED, Range, flag, parse_early, parse_flags


@dataclasses.dataclass(kw_only=True)
class VaeFlags:
    data: str | None = flag(
        None, "folder or zip with train/ and test/; default: the digits", str, metavar="DIR|ZIP", group="data"
    )
    dest: str = flag("assets/tiny-vae", "diffusers folder to make; must not exist", group="output")
    steps: int = flag(1200, "training steps", range=Range(1), group="optimisation")
    batch_size: int = flag(64, "images per step", range=BATCH, group="optimisation")
    learning_rate: float = flag(2e-3, "of Adam, at the start of its cosine schedule", group="optimisation")
    kl_weight: float = flag(1e-3, "weight of the KL per latent value", group="loss")
    seed: int = flag(0, "seed of initial weights, batches and latents", range=SEED, group="optimisation")


if __name__ == "__main__":
    parse_early(VaeFlags, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common.progress import Progress
from common.versions import versions
from digits.data import RESOLUTION, load_digits_split, upsample
from evaluations.metrics.images import read_split
from models.codec import LatentCodec
from preprocessing.encode import TRAINED_ON

DIGITS, PHOTOGRAPHS = ((16, 32, 32), 4), ((16, 32, 64), 8)  # channels of three sizes (factor 4), and of the latents
IMAGES = "scikit-learn's handwritten digits, white on black, 32x32"
SHIFT = 2  # pixels (of 32) that a training image is moved by at most


def build_vae(channels, latent_channels):
    """AutoencoderKL 32×32×3 ↔ C×8×8 of 0.2 to 0.7 M parameters; without attention, which costs more than it gives."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": channels, "layers_per_block": 1, "norm_num_groups": 8}
    sizes["latent_channels"] = latent_channels
    return AutoencoderKL(**blocks, **sizes, sample_size=RESOLUTION, mid_block_add_attention=False)


def shifted(images, generator):
    """Move each of the images (N, 3, R, R) by up to SHIFT pixels; edges are repeated."""
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    moves = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    side = images.shape[-1]
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, moves, strict=True)])


def vae_loss(vae, images, kl_weight, generator):
    """L1 + L2 per pixel + weighted KL per latent value, of images (N, 3, R, R) in [−1, 1]."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return (decoded - images).abs().mean() + F.mse_loss(decoded, images) + kl_weight * kl


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are set to about 1 (Jordan 2024), for the kernels of convolutions.

    PSNR on photographs rises several times faster than with Adam, by steps and by time.
    """

    def __init__(self, kernels, lr):
        super().__init__(kernels, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for kernel in group["params"]:
                momentum = self.state[kernel].setdefault("momentum", torch.zeros_like(kernel))
                momentum.mul_(0.9).add_(kernel.grad)
                update = orthogonal((kernel.grad + 0.9 * momentum).flatten(1))
                taller = max(1, update.shape[0] / update.shape[1])
                kernel.sub_(update.view_as(kernel), alpha=group["lr"] * taller**0.5)


def orthogonal(matrix):
    """A matrix with the same singular vectors and singular values of about 1: five steps of Newton and Schulz."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def optimizers(vae, args):
    """Adam; for photographs Muon at 30 times its rate for the convolutions, and Adam for the rest."""
    kernels = [value for value in vae.parameters() if value.ndim == 4 and args.data]
    rest = [value for value in vae.parameters() if value.ndim != 4 or not args.data]
    adam = torch.optim.Adam(rest, lr=args.learning_rate, betas=(0.9, 0.99))
    return [adam, Muon(kernels, 30 * args.learning_rate)] if args.data else [adam]


def train(vae, images, args):
    """Cosine schedules on shifted uint8 images (N, 3, R, R)."""
    generator = torch.Generator().manual_seed(args.seed)
    chosen = optimizers(vae, args)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps) for optimizer in chosen]
    for _ in (progress := Progress(range(args.steps), desc="train")):
        rows = torch.randint(len(images), (args.batch_size,), generator=generator)
        batch = shifted(images[rows] / 127.5 - 1, generator)
        loss = vae_loss(vae, batch, args.kl_weight, generator)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for part in (*chosen, *schedules):
            part.step()
        progress.set_postfix(loss=loss.item())


def load_images(args):
    """(training images, held-out ones, of digits none), uint8 (N, 3, R, R)."""
    if args.data:
        parts = [read_split(args.data, split, RESOLUTION)[0] for split in ("train", "test")]
    else:
        parts = [upsample(load_digits_split()[0].images), np.empty((0, RESOLUTION, RESOLUTION, 3), np.uint8)]
    return [torch.from_numpy(part).permute(0, 3, 1, 2).contiguous() for part in parts]


def set_scale(vae, images, seed):
    """Set scaling_factor to 1/std of latents drawn over uint8 images (N, 3, R, R): the network sees unit std."""
    with torch.no_grad():
        posterior = vae.encode(images / 127.5 - 1).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(seed))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def psnr(folder, images, seed):
    """Means over uint8 images (N, 3, R, R) of the PSNR (dB) of what the VAE decodes, from mean and drawn latents."""
    codec, found = LatentCodec.load(folder), []
    generator = torch.Generator().manual_seed(seed)
    for batch in images.split(250):
        moments = codec.encode(batch)
        noise = torch.randn(moments[:, : codec.spec.channels].shape, generator=generator)
        decoded = [codec.decode(codec.spec.sample(moments, of)).permute(0, 3, 1, 2) for of in (0 * noise, noise)]
        errors = torch.stack([(image.double() - batch).square().mean(dim=(1, 2, 3)) for image in decoded])
        found.append(10 * (255**2 / errors.clamp(min=1e-9)).log10())
    return dict(zip(("mean latent", "drawn latent"), torch.cat(found, dim=1).mean(dim=1).tolist(), strict=True))


def describe(folder, args, images, held_out):
    """Content of trained_on.json for the VAE in a folder."""
    if not args.data:
        return {"images": IMAGES, "resolution": RESOLUTION, "colour": False}
    about = {"images": f"{len(images)} photographs ({Path(args.data).stem})", "resolution": RESOLUTION, "colour": True}
    about |= {"psnr": {"images": len(held_out), **psnr(folder, held_out, args.seed)}}
    flags = {**vars(args), "data": Path(args.data).name, "dest": Path(args.dest).name}
    return {**about, "flags": flags, "versions": versions("torch", "diffusers")}


def main(argv=None):
    args = parse_flags(VaeFlags, argv, __doc__)
    if Path(args.dest).exists():
        raise InputError(f"--dest {args.dest} exists; remove it or name a new folder")
    torch.manual_seed(args.seed)
    images, held_out = load_images(args)
    vae = build_vae(*(PHOTOGRAPHS if args.data else DIGITS))
    train(vae, images, args)
    vae = vae.eval().half().float()  # the scale belongs to the weights as they are stored
    set_scale(vae, images[:: max(1, len(images) // 2000)], args.seed)
    with whole_folder(args.dest, "--dest") as partial:
        vae.half().save_pretrained(partial)
        write_json(partial / TRAINED_ON, about := describe(partial, args, images, held_out))
    if args.data:
        print(f"PSNR of {about['psnr']['images']} held-out images: {about['psnr']['mean latent']:.2f} dB")
    encode = "python -m preprocessing.dataset_tools encode --source DATA/images --dest DATA/vae-sd"
    print(f"wrote {args.dest}\nnext: {encode} --vae {args.dest}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
