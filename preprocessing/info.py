"""info: what a data folder's manifests say, in ten lines, and a picture of its latents."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import InputError
from dataset import open_dataset
from latents.manifest import MOMENTS, read_manifest
from latents.sets import find_set
from models.codec import LatentCodec


def describe(data_dir):
    """Ten lines about the set of moments in a data folder, or about one set."""
    folder = find_set(data_dir, MOMENTS)
    m = read_manifest(folder)
    if m is None:
        raise InputError(f"{folder} has no manifest, so nothing is recorded; pack it to write one")
    names, latents = m.get("class_names") or [], m.get("latents")
    shards, shape = m.get("shards"), m.get("shape") or m.get("moments_shape")
    made_with = ", ".join(f"{name} {text}" for name, text in m["versions"].items() if isinstance(text, str))
    sharding = f", {len(shards)} shard{'s' * (len(shards) > 1)} of up to {m['shard_size']} rows" if shards else ""
    left_out = f", {len(m['left_out'])} left out" if m["left_out"] else ""
    classes = f"{m['num_classes']} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
    vae = f"{latents['vae']}, scale {latents['scale']}, shift {latents['shift']}" if latents else "-"
    if text := m.get("text"):
        vae = f"{text['encoder']}, {text['tokens']} tokens of width {text['width']}"
        classes = f"- ({m['count']} captions)"
    if encoder := m.get("encoder"):
        vae = f"{encoder['name']}, weights {encoder['weights']}"
    return [
        f"folder      {folder}",
        f"holds       {m['kind']}{', of flipped images' if m.get('flipped') else ''}",
        f"layout      {m['layout']}{sharding}",
        f"images      {m.get('image_count', m['count'])}{left_out}",
        f"classes     {classes}",
        f"resolution  {m['resolution']}, transform {m['transform']}",
        f"row         {tuple(shape) if shape else '-'} {m.get('dtype', m.get('image_format'))}",
        f"made by     {vae}",
        f"job         {m['job']['command']}, source {m['job']['source'][:12]}…",
        f"versions    {made_with}",
    ]


def write_grid(data_dir, path, vae=None, columns=8):
    """Decode the means of columns² evenly spaced latents into one PNG."""
    data = open_dataset(data_dir)
    spec = data.info.spec
    codec = LatentCodec.load(vae or spec.vae)
    spec.check_same(codec.spec, str(data_dir), "--vae")
    indices = np.linspace(0, len(data) - 1, min(columns**2, len(data))).astype(int)
    moments = data.gather(indices)[0]
    latents = spec.sample(moments, torch.zeros_like(moments[:, : spec.channels]))
    images = codec.decode(latents).numpy()
    side = images.shape[1]
    grid = np.zeros((-(-len(images) // columns) * side, columns * side, 3), np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * side, k % columns * side
        grid[top : top + side, left : left + side] = image
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        Image.fromarray(grid).save(file, format="PNG")
    temporary.replace(path)
