"""pack: moments of either layout → packed shards with checksums."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.errors import InputError, note
from common.files import sha256_of_files
from common.versions import versions
from dataset import count_classes
from latents.manifest import IMAGES, LABELS_JSON, MANIFEST, MIRROR, MOMENTS, PREPARE
from latents.names import NO_LABEL, check_names
from latents.sets import check_labels, check_unpacked, images_by_order, is_set, open_moments
from preprocessing.jobs import Job, batches_of
from preprocessing.packed import ShardWriter

BATCH = 512  # rows that are noted as done together


def pack(options):
    """Pack a set, or both sets of moments of a data folder, into sets of the same name. Raises InputError."""
    source, dest = Path(options.source), Path(options.dest)
    sets = ["."] if is_set(source) else [name for name in (MOMENTS, MIRROR) if (source / name).is_dir()]
    if not sets:
        check_unpacked(source, "--source")
        raise InputError(f"--source {source} holds no {MOMENTS}; {PREPARE}")
    for name in sets:
        pack_set(source / name, dest / name, options)


def pack_set(source, dest, options):
    """Pack one set of moments into the folder `dest`."""
    moments = open_moments(source, options.vae)
    manifest, rows, labels, names = moments.manifest, moments.rows, moments.labels, moments.names
    num_classes = manifest.num_classes
    if labels is None:  # captioned images have none
        labels = np.full(len(rows), NO_LABEL)
    else:
        num_classes = count_classes(moments, options.num_classes)
        check_labels(labels, num_classes, moments.labels_file)
    flipped = source.name == MIRROR if manifest.flipped is None else manifest.flipped
    facts = {"kind": "moments", "latents": dataclasses.asdict(moments.spec), "flipped": flipped}
    facts |= {"arithmetic": manifest.arithmetic, "moments_shape": rows.shape}
    fingerprint = sha256_of_files(*(source / n for n in (MANIFEST, LABELS_JSON) if (source / n).is_file()))
    ticket = {"command": "pack", "source": fingerprint, **options.stored(), **facts}
    ticket["flipped"] = bool(manifest.flipped)  # as older versions, which a complete set is compared with
    ticket["normalize"] = None if source.name == MIRROR else options.normalize  # training uses the scale of MOMENTS
    job = Job(dest, {**ticket, "batch": BATCH, "num_classes": num_classes})
    images = source.parent / IMAGES
    if names is None and images.is_dir():  # as published: the folder's images, in order, are those of the set
        names = images_by_order(images, len(rows))
    names = rows.names if names is None else names
    check_names(names)
    if not job.begin():
        note(f"{dest} is complete: nothing to do")
        return
    writer = ShardWriter(job, rows.shape, options)

    def copy(batches):
        buffer = np.empty((BATCH, *rows.shape), rows.dtype)
        with ThreadPoolExecutor(options.workers) as pool:  # reading small files waits for the disk: several at once
            for batch in batches:
                list(pool.map(rows.read, batch, buffer))
                writer.write(batch, buffer[: len(batch)], names)
                yield {}, buffer[: len(batch)]

    job.run(batches_of(len(rows), BATCH), copy, "img")
    facts |= {"images": manifest.image_set, "num_classes": num_classes, "class_names": manifest.class_names}
    facts |= {"resolution": moments.resolution, "transform": manifest.transform, "left_out": manifest.left_out}
    facts |= {"versions": {**manifest.versions, "packed_with": versions()}}
    writer.finish(len(rows), range(len(rows)), names, labels, facts, {})
    note(f"{dest}: {len(rows)} images packed")
