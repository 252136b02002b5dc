"""captions: a JSON of captions and the images that they describe → text features of every caption, packed."""

import dataclasses
import hashlib
import json

import numpy as np

from common.errors import InputError
from common.flags import Range, flag, required
from common.processes import Processes
from latents.captions import CAPTIONS, EMPTY, read_annotations
from latents.manifest import NAMES
from latents.names import Names, pack_names
from models.text import DEFAULT_TEXT_ENCODER, TextEncoder
from preprocessing.fill import fill, ticket
from preprocessing.jobs import Job, to_npy
from preprocessing.options import SetFlags, StoredFlags
from preprocessing.packed import ShardWriter
from preprocessing.sources import ImageSource


@dataclasses.dataclass
class CaptionFlags(StoredFlags, SetFlags):
    """captions of the images → features of a text encoder, as a packed set with the captions beside it"""

    annotations: str = required("COCO's captions, or {file name: [captions]}", metavar="JSON", group="data")
    text_encoder: str = flag(DEFAULT_TEXT_ENCODER, "name or folder", group="model")
    _: dataclasses.KW_ONLY
    batch_size: int = flag(64, "captions per batch and process", range=Range(low=1), group="precision and speed")
    device: str | None = flag(None, "cuda or cpu; default: cuda if present", str, group="precision and speed")


class Captions:
    """All captions in the order of the images: texts (M,), labels (M,): numbers of the images; names of the images."""

    unit = "caption"

    def __init__(self, source, annotations, max_images=None):
        images = ImageSource(source, max_images=max_images)
        groups = read_annotations(annotations, "--annotations")
        listed = images.path / NAMES  # what the files were called before convert, with folders
        origins = Names(listed, images.manifest.count) if images.manifest and listed.is_file() else images.names
        self.texts, owners = [], []
        for index in range(len(images)):
            name = origins[index]
            group = groups.pop(name, None) or groups.pop(name.rsplit("/", 1)[-1], None)  # COCO's names have no folders
            if not group or "" in group:
                raise InputError(f"--annotations {annotations}: {name} of {source} has no or an empty caption; add it")
            self.texts += group
            owners += [index] * len(group)
        self.names, self.labels = [images.names[index] for index in owners], np.array(owners)
        self.facts = {"images": images.fingerprint(), "image_count": len(images), "num_classes": len(images)}
        self.facts |= dict.fromkeys(("class_names", "resolution", "transform"))
        content = [self.facts["images"], owners, self.texts]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, batches):
        """The texts of each batch of positions; none is left out."""
        return ((self.texts[batch.start : batch.stop], {}) for batch in batches)


def write_captions(options):
    """Write the features of every caption of the converted images, and of the empty one, as a packed set."""
    captions = Captions(options.source, options.annotations, options.max_images)
    with Processes.join(options.device) as processes:
        encoder = TextEncoder.load(options.text_encoder, processes.device)
        spec = encoder.spec
        what = {"kind": "captions", "text": dataclasses.asdict(spec)}
        job = Job(options.dest, ticket("captions", captions, options, {**what, **options.stored()}))
        writer = ShardWriter(job, (spec.tokens, spec.width), options)

        def files():
            return {CAPTIONS: pack_names(captions.texts), EMPTY: to_npy(encoder([""])[0].cpu().numpy())}

        fill(writer, captions, encoder, processes, what, "transformers", files)
