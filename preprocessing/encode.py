"""encode, mirror, features: images of one size → one row per image (VAE moments, or features of an encoder).

Runs in one process or under torchrun. Batches are fixed by index and dealt to the processes in turn, so what is
written does not depend on their number.
"""

import contextlib
import dataclasses
import datetime
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, note
from common.versions import versions
from latents.manifest import LABELS_JSON, NAMES
from latents.names import pack_names
from listing import Kept, label_json
from models.codec import DEFAULT_VAE, LatentCodec
from models.encoders import ENCODERS, STRIDE, Encoder, parse_enc_ckpt, parse_enc_type, weights_id
from preprocessing.jobs import Batches, Job
from preprocessing.packed import SHARD_SIZE, ShardWriter
from preprocessing.sources import BadImageError, ImageSource

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Processes:
    """This process among those of torchrun: rank, world size, device."""

    rank: int
    world: int
    device: torch.device

    def barrier(self):
        """Wait for all processes; the first may wait hours for the last."""
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            torch.distributed.barrier(device_ids=ids)


@contextlib.contextmanager
def processes(device=None):
    """Join the processes of torchrun (nccl on GPUs, gloo otherwise), or be alone."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        kind = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(torch.cuda.device_count(), 1)}"
    device = torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))
    try:
        yield Processes(rank, world, device)
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


def latent_name(index):
    """Published name of latent `index`: 00000/img-mean-std-00000000.npy; a thousand per folder."""
    number = f"{index:08d}"
    return f"{number[:5]}/img-mean-std-{number}.npy"


class FolderWriter:
    """One float32 .npy per row, as published."""

    def __init__(self, job):
        self.job = job

    def write(self, positions, rows, names):
        """Write rows (B, *shape) of the images at `positions`; names as in ShardWriter.write."""
        for position, row, name in zip(positions, rows, names, strict=True):
            if not np.isfinite(row).all():
                raise InputError(f"{name} gives latents that are not finite; try --dtype fp32")
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(row, dtype=np.float32))
            self.job.put(latent_name(position), [buffer.getbuffer()])

    def finish(self, count, kept, names, labels, manifest):
        """Write names, dataset.json and the manifest; the arguments are those of ShardWriter.finish."""
        files = {NAMES: pack_names(names), LABELS_JSON: label_json(kept.of(latent_name), labels)}
        self.job.finish(files, {**manifest, "layout": "folder", "count": len(kept), "dtype": "<f4"})


def encode(
    source,
    dest,
    vae=DEFAULT_VAE,
    *,
    batch_size=16,
    dtype="fp32",
    packed=False,
    stored="fp16",
    flip=False,
    shard_size=SHARD_SIZE,
    max_images=None,
    workers=4,
    skip_bad=False,
    published_labels=False,
    device=None,
):
    """Encode images to VAE moments (mean and std, neither sampled nor scaled) in either layout.

    dtype: of the arithmetic; stored: of packed rows; flip: mirror the images first.
    """
    images = ImageSource(source, published_labels, max_images)
    with processes(device) as group:
        side = image_side(images)
        codec = LatentCodec.load(vae, group.device, DTYPES[dtype])
        spec = codec.spec
        if side % spec.factor:
            raise InputError(f"{images.path}: {side}x{side} images do not divide by the VAE's factor {spec.factor}")
        shape = (2 * spec.channels, side // spec.factor, side // spec.factor)
        what = {"kind": "moments", "latents": dataclasses.asdict(spec), "flipped": flip, "arithmetic": dtype}
        layout = {"layout": "packed", "stored": stored, "shard_size": shard_size} if packed else {"layout": "folder"}
        run = Run(images, side, codec.encode, batch_size, workers, skip_bad, flip)
        job = Job(dest, run.ticket("encode", {**what, **layout}))
        writer = ShardWriter(job, shape, STORED[stored], shard_size) if packed else FolderWriter(job)
        run.into(job, writer, group, {**what, "moments_shape": shape})


STORED = {"fp16": "float16", "fp32": "float32"}


def image_side(images):
    """Side of the images of a source, from its manifest or its first image."""
    recorded = (images.manifest or {}).get("resolution")
    if recorded:
        return recorded
    if not len(images):
        raise InputError(f"--source {images.path} holds no images")
    try:
        return images.read(0).width
    except BadImageError as error:
        raise InputError(f"{images.path}/{images.names[0]} cannot be read ({error}); run convert first") from None


class Run:
    """All batches of one source through one function: uint8 (B, 3, R, R) → float rows (B, …)."""

    unit = "img"

    def __init__(self, images, side, function, batch_size, workers, skip_bad, flip=False, package="diffusers"):
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: at least 1")
        self.images, self.side, self.function = images, side, function
        self.batch_size, self.workers, self.skip_bad, self.flip = batch_size, workers, skip_bad, flip
        self.package = package  # whose version the manifest names

    def ticket(self, command, what):
        """What identifies this work, so that a later run goes on with nothing else."""
        common = {"source": self.images.fingerprint(), "batch_size": self.batch_size}
        return {"command": command, **common, **what}

    def into(self, job, writer, group, manifest):
        """Run this process's share of the batches into `writer`; the first process completes the set."""
        if group.rank == 0 and not job.begin():
            note(f"{job.dest} is complete: nothing to do")
        group.barrier()
        if job.is_complete():
            return
        self._encode_share(job, writer, group)
        group.barrier()
        if group.rank == 0:
            self._complete(job, writer, manifest)

    def _encode_share(self, job, writer, group):
        batches = Batches(len(self.images), self.batch_size)
        done = job.finished(len(batches))
        mine = (number for number in range(group.rank, len(batches), group.world) if not done[number])
        initial = sum(len(batches[number]) for number in np.flatnonzero(done))
        bar = tqdm(total=len(self.images), initial=initial, unit=self.unit, desc="encode", disable=group.rank > 0)
        with bar, ThreadPoolExecutor(self.workers) as pool:
            for number, tensor, names, left_out in self._read_ahead(((n, batches[n]) for n in mine), pool):
                if len(tensor):  # a row keeps the place of its image until the end
                    positions = [index for index in batches[number] if index not in left_out]
                    writer.write(positions, self.function(tensor).float().cpu().numpy(), names)
                job.record(number, left_out=left_out)
                bar.update(min(len(batches[number]) * group.world, bar.total - bar.n))

    def _read_ahead(self, todo, pool):
        """(number, images uint8 (B', 3, R, R), names, {index: reason}) per batch; the next one is read meanwhile."""
        waiting = None
        for number, batch in itertools.chain(todo, [(None, ())]):
            futures = (number, [(index, pool.submit(self._read, index)) for index in batch])
            if waiting is not None:
                yield self._collect(*waiting)
            waiting = futures

    def _collect(self, number, futures):
        arrays, names, left_out = [], [], {}
        for index, future in futures:
            name = f"{self.images.path}/{self.images.names[index]}"
            try:
                arrays.append(future.result())
                names.append(name)
            except BadImageError as error:
                if not self.skip_bad:
                    raise InputError(f"{name} cannot be read ({error}); repair it, or pass --skip-bad") from None
                left_out[index] = str(error)
        stacked = np.stack(arrays) if arrays else np.empty((0, 3, self.side, self.side), np.uint8)
        return number, torch.from_numpy(stacked), names, left_out

    def _read(self, index):
        pixels = np.asarray(self.images.read(index))
        if pixels.shape != (self.side, self.side, 3):
            raise InputError(
                f"{self.images.path}/{self.images.names[index]} is {pixels.shape[1]}x{pixels.shape[0]}, "
                f"not {self.side}x{self.side}; convert the images first"
            )
        return pixels.transpose(2, 0, 1)[:, :, :: -1 if self.flip else 1]

    def _complete(self, job, writer, manifest):
        images, left_out = self.images, job.left_out()
        kept = Kept(len(images), left_out)
        if not kept:
            raise InputError(f"{images.path}: not one image could be read")
        for index, reason in left_out.items():
            note(f"left out: {images.names[index]} ({reason})")
        names, labels = kept.of(images.names.__getitem__), kept.of(images.labels.__getitem__)
        source = images.manifest or {}
        facts = {
            "images": job.ticket["source"],
            "num_classes": images.num_classes,
            "class_names": images.class_names,
            "resolution": self.side,
            "transform": source.get("transform"),
            "left_out": [[images.names[index], reason] for index, reason in left_out.items()],
            "versions": versions("torch", self.package),
        }
        writer.finish(len(images), kept, names, labels, {**manifest, **facts})
        note(f"{job.dest}: {len(kept)} images encoded")


def write_features(
    source,
    dest,
    enc_type,
    enc_ckpt=None,
    *,
    batch_size=16,
    stored="fp16",
    flip=False,
    shard_size=SHARD_SIZE,
    max_images=None,
    workers=4,
    skip_bad=False,
    published_labels=False,
    device=None,
):
    """Write patch features of an alignment encoder as a packed set: one row (T, Z) per image.

    enc_type, enc_ckpt: as train.py takes them, of one encoder; flip: mirror the images first.
    """
    names = parse_enc_type(enc_type)
    if len(names) != 1:
        raise InputError(f"--enc-type {enc_type}: a set holds the features of one encoder; run the command for each")
    (name,), (checkpoint,) = names, parse_enc_ckpt(enc_ckpt, names)
    images = ImageSource(source, published_labels, max_images)
    with processes(device) as group:
        side = image_side(images)
        encoder = Encoder(name, side, checkpoint, group.device)
        what = {"kind": "features", "encoder": {"name": name, "weights": weights_id(name, checkpoint)}, "flipped": flip}
        run = Run(
            images, side, lambda x: encoder(x.to(group.device)), batch_size, workers, skip_bad, flip, package="timm"
        )
        job = Job(dest, run.ticket("features", {**what, "stored": stored, "shard_size": shard_size}))
        shape = ((side // STRIDE) ** 2, ENCODERS[name].width)
        run.into(job, ShardWriter(job, shape, STORED[stored], shard_size), group, what)
