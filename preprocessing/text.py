"""captions: a JSON of captions and the images that they describe → text features of every caption, packed."""

import dataclasses
import hashlib
import json

import numpy as np

from common.errors import InputError, note
from common.processes import Processes
from latents.captions import CAPTIONS, EMPTY, read_annotations
from latents.manifest import CHECK
from latents.names import is_data, pack_names
from models.text import TextEncoder
from preprocessing.fill import fill, ticket
from preprocessing.jobs import Job, to_npy
from preprocessing.packed import ShardWriter
from preprocessing.sources import ImageSource


def sha256_of(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Captions:
    """All captions in the order of the images: texts (M,), labels (M,): numbers of the images; names of the images."""

    unit = "caption"

    def __init__(self, source, annotations, max_images=None):
        images = ImageSource(source, max_images=max_images)
        groups = read_annotations(annotations, "--annotations")
        origins = images.origins()
        if origins is not images.names and images.count != len(origins):  # a gap would shift the captions after it
            raise InputError(f"--source {source} has {images.count} images, its manifest says {len(origins)}; {CHECK}")
        self.texts, owners, without = [], [], []
        for index in range(len(images)):
            name = origins[index]
            group = groups.pop(name, None) or groups.pop(name.rsplit("/", 1)[-1], [])  # COCO's names have no folders
            without += [] if group and "" not in group else [name]
            self.texts += group
            owners += [index] * len(group)
        unused = list(filter(is_data, groups))
        counts = f"{len(without)} images of {source} have no or an empty caption"
        if unused:
            counts += f", {len(unused)} names with captions no image (the first is {unused[0]})"
        if without:
            raise InputError(f"--annotations {annotations}: {counts}; the first is {without[0]}; add it")
        if unused:
            note(f"warning: --annotations {annotations}: {counts}")
        self.names, self.labels = [images.names[index] for index in owners], np.array(owners)
        self.facts = {"images": images.fingerprint(), "image_count": len(images), "num_classes": len(images)}
        self.facts |= dict.fromkeys(("class_names", "resolution", "transform"))
        self.fingerprint = sha256_of([self.facts["images"], owners, self.texts])

    def made_from(self, batch_size):
        """For Job; the digest covers only the texts: a changed image does not change their features."""
        return self.names, batch_size, lambda batch: sha256_of(self.texts[batch.start : batch.stop])

    def read(self, batches):
        """The texts of each batch of positions; none is left out."""
        return ((self.texts[batch.start : batch.stop], {}) for batch in batches)


def write_captions(options):
    """Write the features of every caption of the converted images, and of the empty one, as a packed set."""
    captions = Captions(options.source, options.annotations, options.max_images)
    with Processes.join(options.device) as processes:
        encoder = TextEncoder(options.text_encoder, processes.device)
        spec = encoder.spec
        what = {"kind": "captions", "text": dataclasses.asdict(spec)}
        made_from = captions.made_from(options.batch_size)
        job = Job(options.dest, ticket("captions", captions, options, {**what, **options.stored()}), made_from)
        writer = ShardWriter(job, (spec.tokens, spec.width), options)
        files = {CAPTIONS: pack_names(captions.texts), EMPTY: to_npy(encoder([""])[0].cpu().numpy())}
        fill(writer, captions, encoder, processes, what, "transformers", files)
