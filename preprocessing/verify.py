"""verify: is a data folder whole, and does it hold what its manifests say? Reports the first of each kind of fault."""

import collections
import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import InputError
from common.files import sha256_of_files
from common.progress import Progress
from common.records import check_record
from dataset import open_captions
from latents.manifest import (
    AGAIN,
    IMAGES,
    LABELS_JSON,
    MANIFEST,
    MAX_CLASSES,
    MIRROR,
    MOMENTS,
    NAMES,
    TEXT,
    DataManifest,
)
from latents.names import Names, class_of, read_label_list, walk, walk_files
from latents.rows import ImageFiles
from latents.sets import Moments, is_unfinished, list_sets, open_images, open_moments, open_set
from models.codec import LatentCodec
from models.specs import LatentSpec, vae_family
from preprocessing.channels import ChannelSums
from preprocessing.jobs import OWN, batches_of
from preprocessing.sources import is_image_name

BATCH = 256
SAMPLE = 64  # images to encode again
WIDE = (0.25, 4.0)  # std of scaled latents beyond this means another scale or VAE; it is 1 by construction
REENCODED = 0.1  # rms of the difference over rms: bf16 arithmetic stays ten times below, another image far above


class Report:
    """Faults, as {kind: lines about each fault}."""

    def __init__(self):
        self.faults = collections.defaultdict(list)

    def add(self, kind, text):
        self.faults[kind].append(text)

    @contextlib.contextmanager
    def catch(self, kind):
        """An InputError inside is a fault of this kind."""
        try:
            yield
        except InputError as error:
            self.add(kind, str(error))

    def lines(self):
        """One line per kind."""
        return [f"FAULT {kind} ({len(texts)}): {texts[0]}" for kind, texts in self.faults.items()]


def verify(data_dir, vae=None, decode=False):
    """Check every set of a data folder, or one set, also against a VAE. Returns a Report; decode: read images whole."""
    data_dir, report = Path(data_dir), Report()
    folders = list_sets(data_dir) if data_dir.is_dir() else []
    if not folders:
        raise InputError(f"{data_dir} holds no set (a folder with {MANIFEST} or {LABELS_JSON}); name a data folder")
    for folder in filter(is_unfinished, folders):
        report.add("unfinished", f"{folder} is not finished: run its command again")
    folders = [folder for folder in folders if not is_unfinished(folder)]
    for folder in folders:
        with report.catch("unreadable"):
            _check_set(folder, report, decode)
    images, moments = data_dir / IMAGES, data_dir / MOMENTS
    if moments in folders and images.is_dir() and not is_unfinished(images):
        with report.catch("pairs"):
            _check_pairs(images, moments, report)
    if moments in folders and (data_dir / TEXT).is_dir():
        with report.catch("captions"):
            open_captions(data_dir)
    codec = LatentCodec.load(vae) if vae is not None else None
    for folder in folders if codec else ():
        with report.catch("wrong VAE"):
            _check_vae(folder, codec, report)
    return report


def _read_manifest(folder):
    """The manifest, empty if there is none (its path is None); the folder's name supplies missing fields."""
    manifest = DataManifest.read(folder) or DataManifest(count=0)
    kind = manifest.kind or ("images" if folder.name == IMAGES else "moments")
    flipped = folder.name == MIRROR if manifest.flipped is None else manifest.flipped
    return dataclasses.replace(manifest, kind=kind, flipped=flipped)


def _check_set(folder, report, decode):
    manifest = _read_manifest(folder)
    _check_manifest(manifest, report)
    if manifest.kind == "images":
        _check_images(folder, manifest, report, decode)
        return
    if manifest.is_packed:
        checksums = {shard.file: shard.sha256 for shard in manifest.shards} | manifest.files
        _check_files(folder, {MANIFEST, *checksums}, lambda _: True, report)
        for name, expected in Progress(checksums.items(), unit="file", desc=f"checksums {folder.name}"):
            if (folder / name).is_file() and sha256_of_files(folder / name) != expected:
                report.add("checksum", f"{folder / name} differs from the checksum in {MANIFEST}")
    else:
        names, _ = read_label_list(folder)
        _check_files(folder, names, lambda name: name.endswith(".npy") or is_image_name(name), report)
    _, rows, labels, sources = open_set(folder)
    if labels is not None:
        _check_labels(folder, manifest, labels, sources, report)
    elif manifest.kind == "moments" and not (folder.parent / TEXT).is_dir():  # captions are conditions as well
        report.add("labels", f"{folder} has no labels (null)")
    if manifest.kind == "moments":  # check that training can use the shape
        Moments(folder, manifest, rows, labels, sources, manifest.latents or LatentSpec())
    _check_rows(folder, manifest, rows, report)


def _check_manifest(manifest, report):
    """The manifest against itself: its job repeats the VAE."""
    path, spec, names = manifest.path, manifest.latents, manifest.class_names
    if path and manifest.kind == "moments" and spec is None:
        report.add("wrong VAE", f"{path} does not say which VAE made the latents; encode again")
    if spec is not None:
        made_by = manifest.job.get("latents")
        if made_by is not None and check_record(LatentSpec, made_by, f"{path}: 'job'", AGAIN).scaled_as(spec) != spec:
            report.add("wrong VAE", f"{path}: latents is {spec}, but the job says {made_by}")
        if spec.family != vae_family(spec.vae):
            report.add("wrong VAE", f"{path}: VAE {spec.vae} is not of the family {spec.family}")
    if names and (list(names) != sorted(set(names)) or len(names) != manifest.num_classes):
        report.add("class order", f"{path}: class names are not {manifest.num_classes} sorted names")


def _check_files(folder, listed, is_data, report):
    """Report missing files and files not `listed` (None: all are); returns the sorted names of the data files."""
    present = sorted(name for name, _ in walk(folder))
    data = list(filter(is_data, present))
    listed = set(data if listed is None else listed)
    for name in sorted(listed.difference(present)):
        report.add("missing", f"{folder / name} is missing, though the set lists it")
    for name in sorted(set(data) - listed):
        report.add("stray file", f"{folder / name} belongs to no entry; readers that pair by order shift by it")
    return data


def _check_labels(folder, manifest, labels, sources, report):
    classes = manifest.num_classes or MAX_CLASSES
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        name = sources[int(wrong[0])] if sources is not None else f"row {wrong[0]}"
        report.add("label range", f"{folder}: label {labels[wrong[0]]} of {name} is not in 0..{classes - 1}")


def _check_rows(folder, manifest, rows, report):
    """Finite values of every row, a batch at a time; mean and std of latents as the network sees them."""
    sums, spec = None, manifest.latents
    if folder.name == MIRROR and spec and (beside := DataManifest.read(folder.with_name(MOMENTS))):
        spec = spec.scaled_as(beside.latents or spec)  # as in training
    for batch in Progress(batches_of(len(rows), BATCH), unit="batch", desc=f"values {folder.name}"):
        values = np.zeros((len(batch), *rows.shape))
        for index, out in zip(batch, values, strict=True):
            with report.catch("unreadable row"):
                rows.read(index, out)
        finite = np.isfinite(values).reshape(len(batch), -1).all(axis=1)
        for k in np.flatnonzero(~finite).tolist():
            name = f" ({rows.names[batch[k]]})" if hasattr(rows, "names") else ""
            report.add("not finite", f"{folder}: row {batch[k]}{name} holds NaN or inf")
        if manifest.kind == "moments":
            if (np.split(values, 2, axis=1)[1] < 0).any():
                report.add("negative std", f"{folder}: a std is negative; these are not moments (mean, std)")
            if finite.any():
                found = ChannelSums.of(values[finite])
                sums = sums + found if sums else found
    if sums and spec:
        _check_statistics(folder, spec, sums, report)


def _check_statistics(folder, spec, sums, report):
    """Check mean and std of latents as the network sees them, over all channels, and per channel if scales are."""
    means, stds = (np.array(sums.mean) - spec.shift) * spec.scale, sums.std() * spec.scale
    mean, std = means.mean(), np.sqrt(np.mean(stds**2) + means.var())
    text = f"{folder}: scaled latents have mean {mean:.3f} and std {std:.3f}"
    print(text)
    checked = [(mean, std), *(zip(means, stds, strict=True) if isinstance(spec.scale, tuple) else ())]
    if not all(WIDE[0] < std < WIDE[1] and abs(mean) <= WIDE[1] / 2 for mean, std in checked):
        fault = "not about 0 and 1" + " in every channel" * (len(checked) > 1)
        report.add("statistics", f"{text}, {fault}; are {spec.vae} and {spec.normalization} right?")


def _check_images(folder, manifest, report, decode):
    """Image files: listed ones exist with the right size, no others; labels agree with the class folders."""
    names, labels = read_label_list(folder)
    present = _check_files(folder, names, is_image_name, report)
    count, side = len(present if names is None else names), manifest.resolution
    if manifest.path and manifest.count != count:
        report.add("count", f"{folder} holds {count} images, {MANIFEST} says {manifest.count}")
    if manifest.path and names is not None:
        sources = Names(folder / NAMES, len(names))
        _check_labels(folder, manifest, labels, sources, report)
        classes = {name: number for number, name in enumerate(manifest.class_names or ())}
        for source, label in zip(sources, labels.tolist(), strict=True):
            # the top folder's class, unless convert itself named the file (00000/img…)
            expected = label if OWN.fullmatch(source) else classes.get(class_of(source), label)
            if expected != label:
                report.add("label", f"{folder}: {source} has label {label}, its folder is class {expected}")
    for name in Progress(present, unit="img", desc=folder.name):
        try:
            with Image.open(folder / name) as image:
                if decode:
                    image.load()
                side = side or image.width
                if image.size != (side, side):
                    report.add("image size", f"{folder / name} is {image.width}x{image.height}, not {side}x{side}")
        except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
            report.add("unreadable image", f"{folder / name}: {error}")


def _check_pairs(images, latents, report):
    """Images against latents: the same names (or, without a manifest, the same number) and labels."""
    manifest, rows, labels, sources = open_set(latents)
    names, image_labels = read_label_list(images) if (images / LABELS_JSON).is_file() else (None, None)
    if names is None:
        names = walk_files(images, Image.registered_extensions())
    if sources is None and len(names) != len(rows) + len(manifest.left_out if manifest else ()):
        report.add("count", f"{images} holds {len(names)} images, {latents} {len(rows)} latents")
    label_of = dict.fromkeys(names) if image_labels is None else dict(zip(names, image_labels.tolist(), strict=True))
    for k, name in zip(range(len(rows)), names if sources is None else sources, strict=False):
        if name not in label_of:
            report.add("pairs", f"{latents}: row {k} is of {name}, which {images} does not have")
        elif labels is not None and label_of[name] not in (None, labels[k]):
            report.add("labels differ", f"{name} has label {label_of[name]} in {images}, {labels[k]} in {latents}")
    if manifest and manifest.image_set and not report.faults:
        open_images(open_moments(latents))  # raises InputError for images of other sizes


def _check_vae(folder, codec, report):
    """The VAE of --vae against a set of moments: its manifest, and evenly spaced images encoded again."""
    manifest, images = _read_manifest(folder), folder.parent / IMAGES
    if manifest.kind != "moments":
        return
    if manifest.latents is not None:
        manifest.latents.check_same(codec.spec.scaled_as(manifest.latents), str(folder), "--vae")
    if not images.is_dir():
        return
    _, rows, _, sources = open_set(folder)
    names = sources or walk_files(images, Image.registered_extensions())
    files = ImageFiles(images, names.__getitem__, manifest.resolution or rows.shape[1] * codec.spec.factor)
    row = np.empty(rows.shape, rows.dtype)
    count = min(len(rows), len(names))  # if they differ, that is a fault of its own
    for index in np.linspace(0, count - 1, min(SAMPLE, count)).astype(int).tolist():
        with report.catch("pairs"):
            rows.read(index, row)
            pixels = np.ascontiguousarray(files.load(index, manifest.flipped)[None])
            again = codec.encode(torch.from_numpy(pixels))[0].numpy()
            if again.shape != row.shape:
                raise InputError(f"{folder}: {names[index]} encodes to {again.shape}, stored is {row.shape}")
            error = float(np.sqrt(np.mean((again - row) ** 2) / np.mean(again**2)))
            if not error < REENCODED:
                fault = f"row {index} is not what {names[index]} encodes to (difference {error:.2f})"
                raise InputError(f"{folder}: {fault}")


def run(options):
    """Print faults and end with exit code 1 if there are any."""
    report = verify(options.data_dir, options.vae, options.decode)
    print("\n".join(report.lines() or [f"{options.data_dir}: no fault found"]))
    if report.faults:
        sys.exit(1)
