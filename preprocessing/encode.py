"""encode, mirror, features: images of one size → one row per image (VAE moments, or features of an encoder)."""

import dataclasses
import os
from pathlib import Path

import numpy as np

import models  # imports its modules on first use: a complete set needs no torch
from common.errors import InputError, note
from common.records import Count, read_record
from latents.manifest import LABELS_JSON, NAMES, DataManifest
from latents.names import label_json, pack_names
from models.specs import recognise_vae, resolve_vae
from preprocessing.fill import ImageRows, begin, fill, ticket
from preprocessing.jobs import Job, to_npy
from preprocessing.packed import ShardWriter

TRAINED_ON = "trained_on.json"


def latent_name(index):
    """Published name of latent `index`, a thousand per folder."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


class FolderWriter:
    """One float32 .npy per row, as published; its methods are those of ShardWriter."""

    def __init__(self, job):
        self.job = job

    def write(self, positions, rows, names):
        """Write rows (B, *shape) of the images at `positions`."""
        for position, row in zip(positions, rows, strict=True):
            if not np.isfinite(row).all():
                raise InputError(f"{names[position]} gives latents that are not finite; try --dtype fp32")
            self.job.put(latent_name(position), to_npy(np.ascontiguousarray(row, dtype=np.float32)))

    def finish(self, _count, kept, names, labels, manifest, files):
        """Write names, dataset.json and the manifest."""
        rows = list(map(latent_name, kept))
        last = {NAMES: pack_names(names), LABELS_JSON: label_json(rows, labels)}
        self.job.remove_stale(rows)
        self.job.finish({**files, **last}, {**manifest, "layout": "folder", "count": len(kept), "dtype": "<f4"})


@dataclasses.dataclass
class TrainedOn:
    """Content of the optional trained_on.json in the folder of a VAE."""

    images: str
    resolution: Count
    colour: bool


def warn_of_other_images(options, rows):
    """Print a warning if the images are not of the kind that the VAE was trained on."""
    path = Path(resolve_vae(options.vae), TRAINED_ON)
    if not path.is_file():
        return
    trained = read_record(TrainedOn, path, "restore or remove it")
    images, _ = next(rows.read([range(min(len(rows.names), options.batch_size))]))
    is_grey = images is None or (images.amax(1) - images.amin(1)).max() < 16
    if rows.side != trained.resolution or not (is_grey or trained.colour):
        found = f"{rows.side}x{rows.side} images{'' if is_grey else ' in colour'}"
        remedy = "its reconstructions will not look like them; --vae ema is for photographs"
        note(f"warning: --vae {options.vae} was trained on {trained.images}, --source holds {found}; {remedy}")


def encode(options, processes=None):
    """Encode images to VAE moments (mean and std, neither sampled nor scaled) in either layout.

    processes: the Processes that take part; default: all of the launch.
    """
    rows = ImageRows(options)
    if is_complete(options, rows):
        return
    from common.precision import DTYPES
    from common.processes import Processes

    with processes or Processes.join(options.device) as processes:
        codec = models.codec.LatentCodec.load(options.vae, processes.device, DTYPES[options.dtype])
        warn_of_other_images(options, rows)
        spec = codec.spec
        side, rest = divmod(rows.side, spec.factor)
        if rest:
            raise InputError(f"--source {options.source}: {rows.side} pixels are no multiple of --vae's {spec.factor}")
        shape, what = (2 * spec.channels, side, side), made_with(spec, options)
        job = moments_job(rows, what, options)
        writer = ShardWriter(job, shape, options) if options.packed else FolderWriter(job)
        fill(writer, rows, codec.encode, processes, {**what, "moments_shape": shape}, "diffusers")


def is_complete(options, rows):
    """Whether a single process finds the moments complete, which it prints. False also if only `fill` can tell."""
    manifest = DataManifest.read(options.dest) if os.environ.get("WORLD_SIZE", "1") == "1" else None
    spec = manifest and manifest.latents and recognise_vae(options.vae, manifest.latents)
    return bool(spec) and not begin(moments_job(rows, made_with(spec, options), options))


def made_with(spec, options):
    """Entries of the manifest that say how the moments are computed."""
    what = {"kind": "moments", "latents": dataclasses.asdict(spec), "flipped": options.mirror}
    return {**what, "arithmetic": options.dtype}


def moments_job(rows, what, options):
    layout = {"layout": "packed", **options.stored()} if options.packed else {"layout": "folder"}
    asked = {**what, "normalize": options.normalize, **layout}
    return Job(options.dest, ticket("encode", rows, options, asked), rows.made_from)


def write_features(options):
    """Write patch features of an alignment encoder as a packed set: one row (T, Z) per image."""
    from common.processes import Processes
    from models.encoders import ENCODERS, STRIDE, Encoder, parse_enc_ckpt, parse_enc_type, weights_id

    names = parse_enc_type(options.enc_type)
    if len(names) != 1:
        raise InputError(f"--enc-type {options.enc_type}: a set holds the features of one encoder; run it for each")
    (name,), (checkpoint,) = names, parse_enc_ckpt(options.enc_ckpt, names)
    rows = ImageRows(options)
    with Processes.join(options.device) as processes:
        encoder = Encoder(name, rows.side, checkpoint, processes.device)
        what = {"kind": "features", "encoder": {"name": name, "weights": weights_id(name, checkpoint)}}
        what["flipped"] = options.mirror
        job = Job(options.dest, ticket("features", rows, options, {**what, **options.stored()}), rows.made_from)
        writer = ShardWriter(job, ((rows.side // STRIDE) ** 2, ENCODERS[name].width), options)
        fill(writer, rows, lambda images: encoder(images.to(processes.device)), processes, what, "timm")
