"""captions: a JSON of captions and the images that they describe → text features of every caption, packed."""

import dataclasses
import hashlib
import json
from pathlib import Path

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
    """All captions in the order of the images: texts (M,), owners (M,): numbers of the images, names of the images."""

    unit = "caption"

    def __init__(self, source, annotations, max_images=None):
        self.images = images = ImageSource(source, max_images=max_images)
        self.image_set = images.fingerprint()
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
        left_out = images.manifest.left_out if images.manifest else ()
        known = {part for name, _ in left_out for part in (name, Path(name).name)}
        if max_images is None and (strange := groups.keys() - known):
            raise InputError(
                f"--annotations {annotations}: {source} has no image {min(strange)}, though the file has captions of "
                f"it ({len(strange)} such names); convert all images, or correct the file"
            )
        self.names = [images.names[index] for index in self.owners]
        listed = json.dumps([self.image_set, self.owners, self.texts])
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()  # of images, captions and their order

    def __len__(self):
        return len(self.texts)

    def read(self, batches):
        """The texts of each batch of positions; none is left out."""
        return ((self.texts[batch.start : batch.stop], {}) for batch in batches)

    def where(self, index):
        """What a row comes from, for messages."""
        return self.names[index]

    def labelled(self, _kept):
        """Image names and image numbers of all rows."""
        return self.names, self.owners

    def facts(self, _left_out):
        """What the manifest says about the captions."""
        count = len(self.images)
        unknown = {"class_names": None, "resolution": None, "transform": None, "left_out": []}
        return {"images": self.image_set, "image_count": count, "num_classes": count, **unknown}

    def files(self, encoder):
        """The captions, and the features of the empty one."""
        return {CAPTIONS: pack_names(self.texts), EMPTY: to_npy(encoder([""])[0].cpu().numpy())}


def source_names(images):
    """What each image was called before convert: its file's name, with folders."""
    listed = images.path / NAMES
    return Names(listed, images.manifest.count) if images.manifest and listed.is_file() else images.names


def captions_of(groups, name):
    """Take an image's captions from {file name: captions}, by its whole name or, as in COCO, without folders."""
    return groups.pop(name, None) or groups.pop(name.rsplit("/", 1)[-1], None)


def write_captions(options):
    """Write the features of every caption of the converted images, and of the empty one, as a packed set."""
    captions = Captions(options.source, options.annotations, options.max_images)
    with Processes.join(options.device) as processes:
        encoder = TextEncoder.load(options.text_encoder, processes.device)
        spec = encoder.spec
        what = {"kind": "captions", "text": dataclasses.asdict(spec)}
        job = Job(options.dest, ticket("captions", captions, options, {**what, **options.stored()}))
        writer = ShardWriter.from_flags(job, (spec.tokens, spec.width), options)
        fill(writer, captions, encoder, processes, what, "transformers")
