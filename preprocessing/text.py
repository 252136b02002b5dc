"""captions: a JSON of captions and the images that they describe → text features of every caption, packed.

Batches are fixed by index and dealt to the processes in turn, as those of images.
"""

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np

from common.errors import InputError, note
from common.versions import versions
from latents.captions import CAPTIONS, EMPTY, read_annotations
from latents.manifest import NAMES
from latents.names import Names, pack_names
from models.text import DEFAULT_TEXT_ENCODER, TextEncoder
from preprocessing.encode import STORED, Run, processes
from preprocessing.jobs import Job
from preprocessing.packed import SHARD_SIZE, ShardWriter
from preprocessing.sources import ImageSource


class Captions:
    """All captions in the order of the images: texts (M,), owners (M,): numbers of the images, names of the images."""

    def __init__(self, source, annotations, max_images=None):
        images = ImageSource(source, max_images=max_images)
        self.path, self.images = Path(annotations), images
        self.image_count, self.image_set = len(images), images.fingerprint()
        self.texts, self.owners = [], []
        groups, origins = read_annotations(annotations, "--annotations"), source_names(images)
        for index in range(len(images)):
            group = captions_of(groups, origins[index])
            if not group or "" in group:
                raise InputError(
                    f"--annotations {annotations}: the image {origins[index]} of {source} has "
                    f"{'an empty' if group else 'no'} caption; correct the file, or remove the image"
                )
            self.texts += group
            self.owners += [index] * len(group)
        left_out = {part for name, _ in (images.manifest or {}).get("left_out", []) for part in (name, Path(name).name)}
        if max_images is None and (strange := groups.keys() - left_out):
            raise InputError(
                f"--annotations {annotations}: {source} has no image {min(strange)}, though the file has captions of "
                f"it ({len(strange)} such names); convert all images, or correct the file"
            )
        self.names = [images.names[index] for index in self.owners]

    def __len__(self):
        return len(self.texts)

    def fingerprint(self):
        """sha256 of images, captions and their order."""
        listed = json.dumps([self.image_set, self.owners, self.texts])
        return hashlib.sha256(listed.encode()).hexdigest()


def source_names(images):
    """What each image was called before convert: its file's name, with folders."""
    listed = images.path / NAMES
    return Names(listed, images.manifest["count"]) if images.manifest and listed.is_file() else images.names


def captions_of(groups, name):
    """Take an image's captions from {file name: captions}, by its whole name or, as in COCO, without folders."""
    return groups.pop(name, None) or groups.pop(name.rsplit("/", 1)[-1], None)


class CaptionRun(Run):
    """All batches of captions through the text encoder."""

    unit = "caption"

    def __init__(self, captions, encoder, batch_size):
        super().__init__(captions, None, encoder, batch_size, workers=1, skip_bad=False, package="transformers")

    def _read_ahead(self, todo, _pool):
        for number, batch in todo:
            rows = slice(batch.start, batch.stop)
            yield number, self.images.texts[rows], self.images.names[rows], {}

    def _complete(self, job, writer, manifest):
        captions = self.images
        count = captions.image_count
        facts = {"images": captions.image_set, "image_count": count, "num_classes": count, "class_names": None}
        facts |= {"resolution": None, "transform": None, "left_out": [], "versions": versions("torch", self.package)}
        empty = io.BytesIO()
        np.save(empty, self.function([""])[0].cpu().numpy())
        files = {CAPTIONS: pack_names(captions.texts), EMPTY: [empty.getvalue()]}
        rows = range(len(captions))
        writer.finish(len(captions), rows, captions.names, captions.owners, {**manifest, **facts}, files)
        note(f"{job.dest}: {len(captions)} captions of {count} images encoded")


def write_captions(
    source,
    annotations,
    dest,
    text_encoder=DEFAULT_TEXT_ENCODER,
    *,
    batch_size=64,
    stored="fp16",
    shard_size=SHARD_SIZE,
    max_images=None,
    device=None,
):
    """Write the features of every caption of the converted images `source`, and of the empty one, as a packed set."""
    captions = Captions(source, annotations, max_images)
    with processes(device) as group:
        encoder = TextEncoder.load(text_encoder, group.device)
        spec = encoder.spec
        what = {"kind": "captions", "text": dataclasses.asdict(spec)}
        run = CaptionRun(captions, encoder, batch_size)
        job = Job(dest, run.ticket("captions", {**what, "stored": stored, "shard_size": shard_size}))
        run.into(job, ShardWriter(job, (spec.tokens, spec.width), STORED[stored], shard_size), group, what)
