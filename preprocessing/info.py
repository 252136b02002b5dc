"""info: what a data folder's manifests say, in ten lines, and a picture of its latents."""

import numpy as np
import torch

from common.errors import InputError
from common.pictures import save_grid
from dataset import open_dataset
from latents.manifest import MOMENTS, DataManifest
from latents.sets import find_set
from models.codec import LatentCodec


def describe(data_dir):
    """Ten lines about the set of moments in a data folder, or about one set."""
    folder = find_set(data_dir, MOMENTS)
    m = DataManifest.read(folder)
    if m is None:
        raise InputError(f"{folder} has no manifest, so nothing is recorded; pack it to write one")
    sharding = f", {len(m.shards)} shard{'s' * (len(m.shards) > 1)} of up to {m.shard_size} rows" if m.shards else ""
    left_out = f", {len(m.left_out)} left out" if m.left_out else ""
    made_with = ", ".join(f"{name} {text}" for name, text in m.versions.items() if isinstance(text, str))
    return [
        f"folder      {folder}",
        f"holds       {m.kind}{', of flipped images' if m.flipped else ''}",
        f"layout      {m.layout}{sharding}",
        f"images      {m.image_count or m.count}{left_out}",
        f"classes     {_classes(m)}",
        f"resolution  {m.resolution}, transform {m.transform}",
        f"row         {m.shape or m.moments_shape or '-'} {m.dtype or m.image_format}",
        f"made by     {_maker(m)}",
        f"job         {m.job.get('command')}, source {str(m.job.get('source'))[:12]}…",
        f"versions    {made_with}",
    ]


def _classes(manifest):
    if manifest.text:
        return f"- ({manifest.count} captions)"
    names = manifest.class_names or ()
    return f"{manifest.num_classes} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"


def _maker(manifest):
    """The network that made the rows."""
    if vae := manifest.latents:
        return f"{vae.vae}, scale {vae.scale}, shift {vae.shift}"
    if text := manifest.text:
        return f"{text.encoder}, {text.tokens} tokens of width {text.width}"
    if encoder := manifest.encoder:
        return f"{encoder.name}, weights {encoder.weights}"
    return "-"


def write_grid(data_dir, path, vae=None, columns=8):
    """Decode the means of columns² evenly spaced latents into one PNG."""
    data = open_dataset(data_dir)
    spec = data.info.spec
    codec = LatentCodec.load(vae or spec.vae)
    spec.check_same(codec.spec, str(data_dir), "--vae")
    indices = np.linspace(0, len(data) - 1, min(columns**2, len(data))).astype(int)
    moments = data.gather(indices)[0]
    latents = spec.sample(moments, torch.zeros_like(moments[:, : spec.channels]))
    save_grid(codec.decode(latents).numpy(), columns, path)
