"""Small data folders for the tests of dataset.py and preprocessing/."""

import functools
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SPEC = {"vae": "tiny", "family": "tiny", "scale": 1.0, "shift": 0.0, "channels": 4, "factor": 4}


def moments_of(index, side=4):
    """Moments that name their row: mean = index + channel/10, std = 1."""
    mean = index + np.arange(4, dtype=np.float32)[:, None, None] / 10
    return np.concatenate([np.broadcast_to(mean, (4, side, side)), np.ones((4, side, side))]).astype(np.float32)


def write_folder_layout(root, count=12, classes=3, side=4):
    """A data folder as others prepare it: vae-sd with .npy files and dataset.json, no manifest."""
    folder = Path(root) / "vae-sd"
    names = [f"{i // 5:05d}/img-mean-std-{i:08d}.npy" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, moments_of(i, side))
    labels = [[name, i % classes] for i, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return Path(root)


def write_images(folder, names, side=16):
    """Image files whose pixels name them: all channels equal the position in `names`, the left half 100 more."""
    for i, name in enumerate(names):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((side, side, 3), i, np.uint8)
        pixels[:, : side // 2] += 100
        Image.fromarray(pixels).save(path)


def photo(seed, width, height):
    """A smooth random RGB image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_class_folders(root, classes=3, per_class=4, size=(20, 24)):
    """A source tree: class folders with PNG and JPEG files of smooth random images."""
    for c in range(classes):
        folder = Path(root) / f"n{c:04d}"
        folder.mkdir(parents=True)
        for k in range(per_class):
            photo(100 * c + k, *size).save(folder / (f"{k}.png" if k % 2 else f"{k}.JPEG"))
    return Path(root)


@functools.cache
def tiny_vae():
    """Folder of a random KL autoencoder, factor 4, 4 latent channels; made once per test run."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name) / "random-vae"
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
    )
    vae.save_pretrained(folder)
    tiny_vae.holder = holder  # the folder lives as long as the test run
    return folder


def tree(folder):
    """{relative name: sha256} of every file under a folder."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
