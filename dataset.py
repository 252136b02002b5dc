"""What training reads: datasets of VAE moments with labels or captions, opened from a data folder.

    data = open_dataset("DATA")
    sampler = SeekableSampler(len(data), batch_size=256, seed=0)
    for batch in LatentLoader(data, sampler, start_step=1000, stop_step=2000, device="cuda"):
        latents = data.info.spec.sample(batch.moments, noise)

training/loader.py has the sampler and the loader, latents/ the formats on disk, docs/data.md the layouts.

Letters: N images, B rows of a batch, C latent channels, h = w latent size, R image side, L tokens of a caption and W
the width of their features, T tokens of an encoder and Z the width of theirs.
"""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, note
from common.look_ahead import cores_of_process
from latents.captions import CaptionRows, open_text, read_empty
from latents.foreign import CaptionFiles, LogVarianceRows, find_empty, is_foreign, list_foreign
from latents.manifest import MANIFEST, PREPARE, DataManifest
from latents.rows import FolderRows, ImageFiles, StoredRows
from latents.sets import Moments, check_labels, open_features, open_images, open_mirror, open_moments, spec_of_vae
from models.specs import LatentSpec, TextSpec


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What training must know of a dataset; moments_shape is (2C, h, w), resolution the image side R = h·factor."""

    count: int
    num_classes: int
    spec: LatentSpec
    moments_shape: tuple
    resolution: int
    class_names: tuple | None = None

    def model_options(self):
        """Constructor arguments of a model for this data."""
        return {"num_classes": self.num_classes, "in_channels": self.spec.channels, "input_size": self.moments_shape[1]}

    def __str__(self):
        what, spec = self.conditions(), self.spec
        return f"{self.count:,} latents {self.moments_shape}, {what}, VAE {spec.vae} at {spec.normalization}"

    def conditions(self):
        """What the latents are conditioned on, in words."""
        return f"{self.num_classes} classes"


@dataclasses.dataclass(frozen=True)
class CaptionInfo(DataInfo):
    """What training must know of a dataset with captions; num_classes is 0."""

    captions: int = 0
    text: TextSpec = dataclasses.field(default_factory=TextSpec)

    def model_options(self):
        """Constructor arguments of a model for this data."""
        return {"context_dim": self.text.width, "in_channels": self.spec.channels, "input_size": self.moments_shape[1]}

    def conditions(self):
        return f"{self.captions:,} captions of {self.text.encoder}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch.

    moments (B, 2C, h, w); condition: labels int64 (B,), or features of captions (B, L, W); images uint8 (B, 3, R, R) or
    None; features: one tensor (B, T, Z) per encoder whose features are stored. Moments and features keep the precision
    they are stored in (packed: fp16), so that half the bytes travel; sampling with float32 noise makes them float32.
    """

    step: int
    moments: torch.Tensor
    condition: torch.Tensor
    images: torch.Tensor | None
    features: tuple = ()

    def part(self, rows):
        """The given slice of the rows."""
        images = None if self.images is None else self.images[rows]
        features = tuple(stored[rows] for stored in self.features)
        return Batch(self.step, self.moments[rows], self.condition[rows], images, features)


class LatentDataset:
    """Moments with labels, and images and features {encoder: StoredRows} where asked for; made by open_dataset.

    names: of all images; rows: which of them this dataset holds, int64 (N,), all unless `only` restricts it.
    """

    def __init__(self, info, moments, images, mirror, features, workers):
        self.info, self.labels, self.images, self.mirror = info, moments.labels, images, mirror
        self.names, self.rows = moments.row_names, np.arange(info.count)
        self.features = features
        self._moments = StoredRows(moments.rows, mirror)
        usual = max(4, cores_of_process() if images else 0)  # decoding an image takes milliseconds of a core
        self.workers = max(1, usual if workers is None else workers)
        self._pool = ThreadPoolExecutor(self.workers)

    def __len__(self):
        return self.info.count

    def only(self, indices):
        """The part of this dataset with these indices, int64; it shares files and threads with the whole."""
        part = copy.copy(self)
        part.rows, part.info = self.rows[indices], dataclasses.replace(self.info, count=len(indices))
        return part

    def gather_step(self, sampler, step, rows, pin=False):
        """gather of the given rows (array) of the global batch of a step; the step chooses each image's caption."""
        flip = sampler.flips(step)[rows] if self.mirror is not None else None
        return self.gather(sampler.batch(step)[rows], flip, pin, sampler.uniforms(step)[rows])

    def gather(self, indices, flip=None, pin=False, uniforms=None):
        """Moments, condition, images and features of rows `indices`, as in Batch.

        flip: optional bool (B,), true where the mirrored set is meant; pin: into page-locked memory; uniforms (B,) in
        [0, 1): which of its captions each image takes, by default the first.
        """
        indices = self.rows[np.asarray(indices, dtype=np.int64)]
        flip = np.zeros(len(indices), bool) if flip is None else np.asarray(flip, bool)
        moments = self._moments.gather(indices, flip, self._pool, pin)
        features = [stored.gather(indices, flip, self._pool, pin) for stored in self.features.values()]
        condition = self.condition(indices, np.zeros(len(indices)) if uniforms is None else uniforms, pin)
        images = None if self.images is None else self.images.gather(indices.tolist(), flip.tolist(), self._pool)
        return moments, condition, images, *features

    def condition(self, rows, uniforms, pin):
        """Labels of rows of the folder."""
        return torch.from_numpy(self.labels[rows])

    def drop(self, condition, dropped):
        """Labels (B,) with the null class where `dropped` (B,) is true."""
        return torch.where(dropped, self.info.num_classes, condition)

    def conditions(self, n):
        """n labels for a picture, in class order; the null class n times; what is written of them."""
        labels = torch.arange(n) * self.info.num_classes // n
        return labels, torch.full_like(labels, self.info.num_classes), labels.tolist()


class CaptionDataset(LatentDataset):
    """Moments with the features of a caption in place of the label; of an image's captions each step draws one."""

    def __init__(self, info, moments, text, images, features, workers):
        super().__init__(info, moments, images, None, features, workers)
        self.text, self._text_rows = text, StoredRows(text.rows)
        self._empty = text.empty

    def only(self, indices):
        """As of every dataset; captions are counted anew."""
        part = super().only(indices)
        captions = int((self.text.starts[part.rows + 1] - self.text.starts[part.rows]).sum())
        part.info = dataclasses.replace(part.info, captions=captions)
        return part

    def condition(self, rows, uniforms, pin):
        """Features (B, L, W) of one caption for each row of the folder."""
        return self.context(self.text.choose(rows, uniforms), pin)

    def context(self, rows, pin=False):
        """Features (B, L, W) of captions by row, in the precision in which they are stored."""
        return self._text_rows.gather(np.asarray(rows), np.zeros(len(rows), bool), self._pool, pin)

    def drop(self, condition, dropped):
        """Features (B, L, W), float32, with those of the empty caption where `dropped` (B,) is true."""
        self._empty = self._empty.to(condition.device)  # once: a copy in every step would wait for the device
        return torch.where(dropped[:, None, None], self._empty, condition.float())

    def conditions(self, n):
        """Features of the first captions of n images, of the empty caption n times, and the captions."""
        rows = self.text.starts[self.rows[np.arange(n) * len(self) // n]]
        texts = [self.text.captions[row] for row in rows.tolist()]
        return self.context(rows).float(), self.text.empty.expand(n, -1, -1), texts


def open_dataset(data_dir, *, images=False, mirror=False, features=(), num_classes=None, data_vae=None, workers=None):
    """Open a data folder of either layout. Raises InputError for what does not fit.

    images, mirror: also read `images`, `vae-sd-mirror`; features: names of the encoders whose `features-NAME` to read;
    num_classes, data_vae: what a folder without a manifest leaves open; workers: threads that read files, by default 4
    or, if images are read, at least one per core.
    """
    moments = open_moments(data_dir, data_vae)
    if moments.labels is None:
        remedy = "put the images into class folders (one is enough), then convert and encode again"
        raise InputError(f"{moments.labels_file}: labels are missing (null); {remedy}")
    classes = count_classes(moments, num_classes)
    check_labels(moments.labels, classes, moments.labels_file)
    rows, spec = moments.rows, moments.spec
    info = DataInfo(len(rows), classes, spec, rows.shape, moments.resolution, moments.manifest.class_names)
    files = open_images(moments) if images else None
    mirrored = open_mirror(moments) if mirror else None
    stored = {name: open_features(data_dir, name, moments, mirror) for name in features}
    return LatentDataset(info, moments, files, mirrored, stored, workers)


def count_classes(moments, num_classes):
    """Number of classes of labelled Moments; num_classes: --num-classes or None. Raises InputError."""
    folder, recorded = moments.folder, moments.manifest.num_classes
    if recorded and num_classes not in (None, recorded):
        raise InputError(f"--num-classes {num_classes}: {folder / MANIFEST} says {recorded}; leave the flag out")
    if known := recorded or num_classes:
        return known
    classes = int(moments.labels.max()) + 1
    note(f"{folder} does not say how many classes it has: {classes} (largest label + 1; otherwise --num-classes)")
    return classes


def open_captions(data_dir, *, images=False, features=(), data_vae=None, workers=None):
    """Open a data folder with captions; arguments as open_dataset's. Raises InputError for what does not fit."""
    if is_foreign(data_dir):
        if features:
            raise InputError(f"{data_dir}: stored encoder features need DATA/vae-sd; compute them while training")
        moments, text = open_foreign(Path(data_dir), data_vae)
        files = ImageFiles(data_dir, "{}.png".format, moments.resolution) if images else None
    else:
        moments = open_moments(data_dir, data_vae)
        text = open_text(moments)
        files = open_images(moments) if images else None
    rows, spec = moments.rows, moments.spec
    info = CaptionInfo(len(rows), 0, spec, rows.shape, moments.resolution, captions=len(text.rows), text=text.spec)
    stored = {name: open_features(data_dir, name, moments) for name in features}
    return CaptionDataset(info, moments, text, files, stored, workers)


def open_foreign(folder, data_vae):
    """(Moments, CaptionRows) of a folder of {i}.npy (mean and log-variance) and {i}_{k}.npy (features)."""
    count, pairs = list_foreign(folder)
    spec = spec_of_vae(data_vae) if data_vae else LatentSpec()
    rows = LogVarianceRows(folder, [f"{i}.npy" for i in range(count)])
    contexts = FolderRows(folder, ["{}_{}.npy".format(*pair) for pair in pairs])
    if len(contexts.shape) != 2:
        raise InputError(f"{folder}: features of captions have shape {contexts.shape}, not (L, W); {PREPARE}")
    text_spec = TextSpec(tokens=contexts.shape[0], width=contexts.shape[1])
    encoders = f"{spec.vae} at {spec.normalization} and {text_spec.encoder}"
    note(f"warning: {folder} does not say its encoders; taken as {encoders}")
    starts = np.searchsorted([i for i, _ in pairs], np.arange(count + 1))
    empty = read_empty(find_empty(folder), contexts.shape)
    text = CaptionRows(contexts, starts, CaptionFiles(folder, pairs), empty, text_spec)
    return Moments(folder, DataManifest(count=count), rows, None, None, spec), text
