"""pack: moments of either layout → packed shards with checksums."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import InputError, note
from common.files import sha256_of_files
from common.versions import versions
from dataset import open_dataset
from latents.manifest import IMAGES, LABELS_JSON, MANIFEST, MIRROR, MOMENTS, PREPARE, image_set
from latents.names import walk_files
from latents.sets import open_set
from preprocessing.encode import STORED
from preprocessing.jobs import Batches, Job
from preprocessing.packed import SHARD_SIZE, ShardWriter

BATCH = 512  # rows that are noted as done together


def is_set(folder):
    """True where a folder is one set itself, not a data folder of sets."""
    return any((folder / name).is_file() for name in (MANIFEST, LABELS_JSON))


def pack(source, dest, stored="fp16", shard_size=SHARD_SIZE, vae=None, num_classes=None, workers=8):
    """Pack a set, or every set of moments of a data folder (`vae-sd`, `vae-sd-mirror`), into sets of the same name.

    vae, num_classes: what a folder without a manifest does not say. Raises InputError on bad input.
    """
    source, dest = Path(source), Path(dest)
    if is_set(source) or not source.is_dir():
        return pack_set(source, dest, stored, shard_size, vae, num_classes, workers)
    found = [name for name in (MOMENTS, MIRROR) if (source / name).is_dir()]
    if not found:
        raise InputError(f"--source {source} holds no {MOMENTS}; {PREPARE}")
    for name in found:
        pack_set(source / name, dest / name, stored, shard_size, vae, num_classes, workers)
    return None


def pack_set(source, dest, stored, shard_size, vae, num_classes, workers):
    """Pack one set of moments into the folder `dest`."""
    data = open_dataset(source, num_classes=num_classes, data_vae=vae)
    info = data.info
    manifest, rows, labels, names = open_set(source)
    manifest = manifest or {}
    names = _source_names(source, rows, names)
    facts = {
        "kind": "moments",
        "latents": dataclasses.asdict(info.spec),
        "flipped": manifest.get("flipped", False),
        "arithmetic": manifest.get("arithmetic"),
        "moments_shape": list(info.moments_shape),
    }
    fingerprint = sha256_of_files(*(source / n for n in (MANIFEST, LABELS_JSON) if (source / n).is_file()))
    ticket = {"command": "pack", "source": fingerprint, "stored": stored, "shard_size": shard_size, **facts}
    job = Job(dest, {**ticket, "batch": BATCH, "num_classes": info.num_classes})
    if not job.begin():
        return note(f"{dest} is complete: nothing to do")
    writer = ShardWriter(job, rows.shape, STORED[stored], shard_size)
    _copy(rows, names, writer, workers)
    facts |= {
        "images": image_set(manifest),
        "num_classes": info.num_classes,
        "class_names": list(info.class_names) if info.class_names else None,
        "resolution": info.resolution,
        "transform": manifest.get("transform"),
        "left_out": manifest.get("left_out", []),
        "versions": {**manifest.get("versions", {}), "packed_with": versions()},
    }
    writer.finish(len(rows), range(len(rows)), names, labels, facts)
    return note(f"{dest}: {len(rows)} images packed")


def _copy(rows, names, writer, workers):
    """Copy all batches that the journal lacks."""
    batches = Batches(len(rows), BATCH)
    done = writer.job.finished(len(batches))
    buffer = np.empty((BATCH, *rows.shape), rows.dtype)
    initial = sum(len(batches[number]) for number in np.flatnonzero(done))
    with tqdm(total=len(rows), initial=initial, unit="img", desc="pack") as bar, ThreadPoolExecutor(workers) as pool:
        for number, batch in enumerate(batches):
            if done[number]:
                continue
            list(pool.map(rows.read, batch, buffer))  # reading small files waits for the disk: several at once
            writer.write(batch, buffer[: len(batch)], [names[index] for index in batch])
            writer.job.record(number)
            bar.update(len(batch))


def _source_names(source, rows, names):
    """Names of the images: as recorded, else by published order from the images beside the set, else the latents'."""
    if names is not None:
        return names
    images = source.parent / IMAGES
    if not images.is_dir():
        return rows.names
    Image.init()
    found = walk_files(images, Image.EXTENSION.keys())
    if len(found) != len(rows):
        raise InputError(f"{images} holds {len(found)} images for {len(rows)} latents; remove the stray files")
    return found
