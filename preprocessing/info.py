"""info: what a data folder's manifests say, in ten lines, and a picture of its latents."""

import numpy as np
import torch

from common.errors import InputError
from common.pictures import classes_of_rows, save_grid
from latents.manifest import MOMENTS, DataManifest
from latents.sets import find_set, open_moments
from models.codec import LatentCodec


def describe(data_dir):
    """Ten lines about the set of moments in a data folder, or about one set."""
    folder = find_set(data_dir, MOMENTS)
    m = DataManifest.read(folder)
    if m is None:
        raise InputError(f"{folder} has no manifest, so nothing is recorded; pack it to write one")
    names = m.class_names or ()
    facts = {
        "folder": folder,
        "holds": f"{m.count} {m.kind}{' of flipped images' if m.flipped else ''}, {len(m.left_out)} images left out",
        "layout": f"{m.layout}, {len(m.shards)} shards",
        "classes": f"{m.num_classes} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})",
        "resolution": f"{m.resolution}, transform {m.transform}",
        "row": f"{m.shape or m.moments_shape or '-'} {m.dtype or m.image_format}",
        "made by": m.latents or m.text or m.encoder or "-",
        "images": m.images,
        "job": f"{m.job.get('command')}, source {m.job.get('source')}",
        "versions": ", ".join(f"{name} {text}" for name, text in m.versions.items() if isinstance(text, str)),
    }
    return [f"{name:11} {text}" for name, text in facts.items()]


def write_grid(data_dir, path, vae=None, columns=8):
    """Decode the means of columns² evenly spaced latents into one PNG."""
    moments = open_moments(data_dir)  # captions can replace labels
    rows, spec = moments.rows, moments.spec
    codec = LatentCodec.load(vae or spec.vae).fit(spec, data_dir)
    indices = np.linspace(0, len(rows) - 1, min(columns**2, len(rows))).astype(int)
    values = torch.empty(len(indices), *rows.shape)
    for index, out in zip(indices, values.numpy(), strict=True):
        rows.read(index, out)
    latents = spec.sample(values, torch.zeros_like(values[:, : spec.channels]))
    labels = [] if moments.labels is None else moments.labels[indices].tolist()
    names = classes_of_rows(labels, columns, moments.manifest.class_names)
    save_grid(codec.decode(latents).numpy(), columns, path, row_names=names)


def run(options):
    """Print the lines, write the picture."""
    print("\n".join(describe(options.data_dir)))
    if options.grid:
        write_grid(options.data_dir, options.grid, options.vae)
        print(f"wrote {options.grid}: decoded latents")
