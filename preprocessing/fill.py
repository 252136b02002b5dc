"""Filling a set with one row per image or caption, by one process or by all of torchrun's.

Batches are fixed by index and dealt to the processes in turn, so what is written does not depend on their number.
"""

import itertools

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, note
from common.look_ahead import ordered_map
from common.versions import versions
from preprocessing.jobs import Batches
from preprocessing.sources import BadImageError


class ImageRows:
    """The images of a source as network input: uint8 (B, 3, R, R), mirrored if `mirror`; all must be R×R."""

    unit = "image"

    def __init__(self, images, options, mirror=False):
        self.images, self.side, self.mirror = images, side_of(images), mirror
        self.fingerprint = images.fingerprint()  # identifies the source
        self.batch_size, self.workers, self.skip_bad = options.batch_size, options.workers, options.skip_bad

    def __len__(self):
        return len(self.images)

    def read(self, batches):
        """For each batch of positions: (images, {position: reason} of those left out); the next is read meanwhile."""
        ahead = max(self.batch_size, self.workers)
        results = ordered_map(self._read, itertools.chain.from_iterable(batches), ahead, self.workers)
        for batch in batches:
            found = list(itertools.islice(results, len(batch)))
            arrays = [pixels for pixels, _ in found if pixels is not None]
            left_out = {index: reason for index, (_, reason) in zip(batch, found, strict=True) if reason is not None}
            yield torch.from_numpy(np.stack(arrays)) if arrays else None, left_out

    def _read(self, index):
        """(uint8 (3, R, R), None), or (None, reason)."""
        image, reason = self.images.read_or_skip(index, self.skip_bad)
        if image is None:
            return None, reason
        if image.size != (self.side, self.side):
            raise InputError(
                f"{self.where(index)} is {image.width}x{image.height}, not {self.side}x{self.side}; "
                "convert the images first"
            )
        return np.asarray(image).transpose(2, 0, 1)[:, :, :: -1 if self.mirror else 1], None

    def where(self, index):
        """What a row comes from, for messages."""
        return self.images.where(index)

    def labelled(self, kept):
        """Names and labels of the rows `kept`."""
        return [self.images.names[index] for index in kept], self.images.labels[kept]

    def facts(self, left_out):
        """What the manifest says about the images."""
        images = self.images
        return {
            "images": self.fingerprint,
            "num_classes": images.num_classes,
            "class_names": images.class_names,
            "resolution": self.side,
            "transform": images.manifest.transform if images.manifest else None,
            "left_out": [[images.names[index], reason] for index, reason in left_out.items()],
        }

    def files(self, _function):
        """Further files of the set: none."""
        return {}


def side_of(images):
    """Side of the images of a source, from its manifest or its first image."""
    if images.manifest and images.manifest.resolution:
        return images.manifest.resolution
    if not len(images):
        raise InputError(f"--source {images.path} holds no images")
    try:
        return images.read(0).width
    except BadImageError as error:
        raise InputError(f"{images.where(0)} cannot be read ({error}); run convert first") from None


def ticket(command, rows, options, what):
    """What identifies the work, so that a later run resumes nothing else."""
    return {"command": command, "source": rows.fingerprint, "batch_size": options.batch_size, **what}


def fill(writer, rows, function, processes, manifest, package):
    """Run this process's share of the batches of `rows` through function: a batch → (B, …), into the set of `writer`.

    The first process completes the set. manifest: what was computed; package: the one whose version is recorded.
    """
    job = writer.job
    if processes.is_main and not job.begin():
        note(f"{job.dest} is complete: nothing to do")
    processes.barrier()
    if job.is_complete():
        return
    _fill_share(writer, rows, function, processes)
    processes.barrier()
    if processes.is_main:
        facts = {**rows.facts(job.left_out()), "versions": versions("torch", package)}
        _complete(writer, rows, function, {**manifest, **facts})


def _fill_share(writer, rows, function, processes):
    batches = Batches(len(rows), writer.job.ticket["batch_size"])
    done = writer.job.finished(len(batches))
    mine = [number for number in range(processes.rank, len(batches), processes.world) if not done[number]]
    initial = sum(len(batches[number]) for number in np.flatnonzero(done))
    with tqdm(total=len(rows), initial=initial, unit=rows.unit, desc="encode", disable=not processes.is_main) as bar:
        inputs = rows.read([batches[number] for number in mine])
        for number, (batch, left_out) in zip(mine, inputs, strict=True):
            positions = [index for index in batches[number] if index not in left_out]
            if positions:  # a row keeps the place of its image until the end
                values = function(batch).float().cpu().numpy()
                writer.write(positions, values, [rows.where(index) for index in positions])
            writer.job.record(number, left_out=left_out)
            bar.update(min(len(batches[number]) * processes.world, bar.total - bar.n))


def _complete(writer, rows, function, manifest):
    left_out = writer.job.left_out()
    kept = [index for index in range(len(rows)) if index not in left_out]
    if not kept:
        raise InputError(f"{rows.images.path}: not one image could be read")
    for name, reason in manifest["left_out"]:
        note(f"left out: {name} ({reason})")
    names, labels = rows.labelled(kept)
    writer.finish(len(rows), kept, names, labels, manifest, rows.files(function))
    note(f"{writer.job.dest}: {len(kept)} {rows.unit}s encoded")
