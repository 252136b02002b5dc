"""Filling a set with one row per image or caption, by one process or by all of torchrun's.

Batches are fixed by index and dealt to the processes in turn, so what is written does not depend on their number.
"""

import itertools

import numpy as np

from common.errors import InputError, note
from common.look_ahead import ordered_map
from common.versions import versions
from preprocessing.jobs import batches_of
from preprocessing.sources import ImageSource


class ImageRows:
    """The images of --source as network input: uint8 (B, 3, R, R), mirrored if options.mirror; all must be R×R.

    names, labels: of all images; fingerprint: identifies them; made_from: as for Job; facts: entries of the manifest.
    """

    unit = "image"

    def __init__(self, options):
        self.images = images = ImageSource(options.source, options.published_labels, options.max_images)
        self.options, self.names, self.labels = options, images.names, images.labels
        manifest = images.manifest
        self.side = (manifest and manifest.resolution) or images.first_width(options.skip_bad)
        if not self.side:
            raise InputError(f"--source {options.source} holds no readable images; name a folder that convert made")
        self.fingerprint, self.made_from = images.fingerprint(), images.made_from(options.batch_size)
        self.facts = {"images": self.fingerprint}
        self.facts |= {"num_classes": images.num_classes, "class_names": images.class_names}
        self.facts |= {"resolution": self.side, "transform": manifest and manifest.transform}

    def read(self, batches):
        """For each batch of positions: (images, {position: reason} of those left out); the next is read meanwhile."""
        import torch  # here, as a complete set needs no torch

        ahead = max(self.options.batch_size, self.options.workers)
        results = ordered_map(self._read, itertools.chain.from_iterable(batches), ahead, self.options.workers)
        for batch in batches:
            found = list(itertools.islice(results, len(batch)))
            arrays = [pixels for pixels, _ in found if pixels is not None]
            left_out = {index: reason for index, (_, reason) in zip(batch, found, strict=True) if reason is not None}
            yield torch.from_numpy(np.stack(arrays)) if arrays else None, left_out

    def _read(self, index):
        """(uint8 (3, R, R), None), or (None, reason)."""
        image, reason = self.images.read_or_skip(index, self.options.skip_bad)
        if image is None:
            return None, reason
        if image.size != (self.side, self.side):
            size = f"{image.width}x{image.height}, not {self.side}x{self.side}"
            raise InputError(f"{self.images.where(index)} is {size}; convert the images first")
        return np.asarray(image).transpose(2, 0, 1)[:, :, :: -1 if self.options.mirror else 1], None


def ticket(command, rows, options, what):
    """What identifies the work, so that a later run resumes nothing else."""
    return {"command": command, "source": rows.fingerprint, "batch_size": options.batch_size, **what}


def begin(job):
    """As Job.begin; prints a note if everything is there."""
    if not (is_open := job.begin()):
        note(f"{job.dest} is complete: nothing to do")
    return is_open


def fill(writer, rows, function, processes, manifest, package, files=None):
    """Run this process's share of the batches of `rows` through function: a batch → (B, …), into the set of `writer`.

    manifest: what was computed; package: its version is recorded; files: {name: bytes}, additional files.
    """
    job, total = writer.job, len(rows.names)
    if not processes.share("begun", processes.is_main and begin(job)):
        return

    def compute(batches):
        for batch, (inputs, left_out) in zip(batches, rows.read(batches), strict=True):
            positions = [index for index in batch if index not in left_out]
            values = ()
            if positions:  # a row keeps the place of its image until the end
                values = function(inputs).float().cpu().numpy()
                writer.write(positions, values, rows.names)
            yield left_out, values

    batches = batches_of(total, job.ticket["batch_size"])
    job.run(batches, compute, rows.unit, processes.rank, processes.world)
    processes.barrier()
    if processes.is_main:
        if job.unfinished(batches)[0]:
            raise InputError(f"{job.dest}: some batches are not recorded as finished; run the same again")
        kept, left_out = job.kept(rows.names)
        names, labels = [rows.names[index] for index in kept], np.asarray(rows.labels)[kept]
        manifest = {**manifest, **rows.facts, "left_out": left_out, "versions": versions("torch", package)}
        writer.finish(total, kept, names, labels, manifest, files or {})
        note(f"{job.dest}: {len(kept)} {rows.unit}s encoded")
