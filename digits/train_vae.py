"""Train the tiny KL autoencoder of the quickstart. About six minutes on one CPU core.

    OMP_NUM_THREADS=1 python -m digits.train_vae --dest assets/tiny-vae

made assets/tiny-vae, and makes it again byte for byte where torch's arithmetic is the same (2.15, x86).

It sees the training digits only. Letters: N batch, R = 32 image size, C = 4 latent channels, h = w = 8 latent size.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import whole_folder, write_json
from common.flags import BATCH, SEED, Range, flag, parse_early, parse_flags


@dataclasses.dataclass(kw_only=True)
class VaeFlags:
    dest: str = flag("assets/tiny-vae", "diffusers folder to make; must not exist", group="output")
    steps: int = flag(1200, "training steps", range=Range(1), group="optimisation")
    batch_size: int = flag(64, "images per step", range=BATCH, group="optimisation")
    learning_rate: float = flag(2e-3, "of Adam, at the start of its cosine schedule", group="optimisation")
    kl_weight: float = flag(1e-3, "weight of the KL per latent value", group="loss")
    seed: int = flag(0, "seed of initial weights, batches and latents", range=SEED, group="optimisation")


if __name__ == "__main__":
    parse_early(VaeFlags, __doc__)

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common.progress import Progress
from digits.data import RESOLUTION, load_digits_split, upsample
from preprocessing.encode import TRAINED_ON

CHANNELS = (16, 32, 32)  # three entries: downsampling factor 4
IMAGES = "scikit-learn's handwritten digits, white on black, 32x32"
SHIFT = 2  # pixels (of 32) that a training image is moved by at most


def build_vae():
    """AutoencoderKL 32×32×3 ↔ 4×8×8 of 0.23 M parameters; without attention, which costs more than it gives here."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes = {"block_out_channels": CHANNELS, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    return AutoencoderKL(**blocks, **sizes, sample_size=RESOLUTION, mid_block_add_attention=False)


def shifted_batch(images, size, generator):
    """Draw `size` images of (N, 3, R, R) and move each by up to SHIFT pixels; edges are repeated."""
    padded = F.pad(images[torch.randint(len(images), (size,), generator=generator)], (SHIFT,) * 4, mode="replicate")
    moves = torch.randint(2 * SHIFT + 1, (size, 2), generator=generator).tolist()
    side = RESOLUTION
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, moves, strict=True)])


def vae_loss(vae, images, kl_weight, generator):
    """L1 + L2 per pixel + weighted KL per latent value, of images (N, 3, R, R) in [−1, 1]."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return (decoded - images).abs().mean() + F.mse_loss(decoded, images) + kl_weight * kl


def train(vae, images, args):
    """Adam with a cosine schedule on shifted images."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in (progress := Progress(range(args.steps), desc="train")):
        loss = vae_loss(vae, shifted_batch(images, args.batch_size, generator), args.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=loss.item())


def set_scale(vae, images, seed):
    """Set scaling_factor to 1/std of latents drawn over uint8 images (N, 3, R, R): the network sees unit std."""
    with torch.no_grad():
        posterior = vae.encode(images / 127.5 - 1).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(seed))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def main(argv=None):
    args = parse_flags(VaeFlags, argv, __doc__)
    if Path(args.dest).exists():
        raise InputError(f"--dest {args.dest} exists; remove it or name a new folder")
    torch.manual_seed(args.seed)
    images = torch.from_numpy(upsample(load_digits_split()[0].images)).permute(0, 3, 1, 2).contiguous()
    vae = build_vae()
    train(vae, images / 127.5 - 1, args)
    vae = vae.eval().half().float()  # the scale belongs to the weights as they are stored
    set_scale(vae, images, args.seed)
    with whole_folder(args.dest, "--dest") as partial:
        vae.half().save_pretrained(partial)
        write_json(partial / TRAINED_ON, {"images": IMAGES, "resolution": RESOLUTION, "colour": False})
    encode = "python -m preprocessing.dataset_tools encode --source DATA/images --dest DATA/vae-sd"
    print(f"wrote {args.dest}\nnext: {encode} --vae {args.dest}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
