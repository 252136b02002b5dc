"""verify: is a data folder whole, and does it hold what its manifests say? Reports the first of each kind of fault."""

import contextlib
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.errors import InputError
from common.files import sha256_of_files
from dataset import open_captions
from latents.captions import TEXT
from latents.manifest import IMAGES, LABELS_JSON, MANIFEST, MIRROR, MOMENTS, NAMES, DataManifest, read_latents
from latents.names import Names, read_label_list, walk
from latents.sets import is_set, is_unfinished, list_sets, open_set
from models.codec import LatentCodec, vae_family
from preprocessing.jobs import Batches
from preprocessing.sources import class_of, is_image_name

BATCH = 256
WIDE = (0.25, 4.0)  # std of scaled latents beyond this means another scale or VAE; it is 1 by construction
REENCODED = 0.1  # rms of the difference over rms: bf16 arithmetic stays ten times below, another image far above
WORDNET = re.compile(r"n\d{8}")


class Report:
    """Faults by kind: how often, and the first."""

    def __init__(self):
        self.faults = {}

    def add(self, kind, text):
        """Note a fault."""
        count, first = self.faults.get(kind, (0, text))
        self.faults[kind] = (count + 1, first)

    @contextlib.contextmanager
    def catch(self, kind):
        """An InputError inside is a fault of this kind."""
        try:
            yield
        except InputError as error:
            self.add(kind, str(error))

    def lines(self):
        """One line per kind."""
        return [f"FAULT {kind} ({count}): {first}" for kind, (count, first) in self.faults.items()]


def verify(data_dir, vae=None, sample=64, decode=False):
    """Check every set of a data folder, or one set. Returns a Report.

    vae: compare with this VAE and encode `sample` images again; decode: read every image whole, not only its header.
    """
    data_dir, report = Path(data_dir), Report()
    if not data_dir.is_dir():
        raise InputError(f"{data_dir} does not exist; name a data folder or one set of it")
    folders = list_sets(data_dir)
    if not folders:
        raise InputError(f"{data_dir} holds no set (a folder with {MANIFEST} or {LABELS_JSON})")
    for folder in folders:
        if is_unfinished(folder):
            report.add("unfinished", f"{folder} is not finished: run its command again")
            continue
        with report.catch("unreadable"):
            verify_set(folder, report, decode)
    with report.catch("pairs"):
        _check_pairs(data_dir / IMAGES, data_dir / MOMENTS, report)
    if (data_dir / TEXT).is_dir() and (data_dir / MOMENTS).is_dir():
        with report.catch("captions"):
            open_captions(data_dir)
    if vae is not None:
        with report.catch("wrong VAE"):
            _check_vae(folders, vae, sample, report)
    return report


def verify_set(folder, report, decode=False):
    """Check one set by itself."""
    manifest, files = DataManifest.read(folder), sorted(name for name, _ in walk(folder))
    if manifest is not None:
        _check_manifest(manifest, report)
    if _kind(manifest, folder) == "images":
        return _verify_images(folder, manifest, files, report, decode)
    if manifest is not None and manifest.is_packed:
        _check_checksums(folder, manifest, report)
        expected = {MANIFEST, *manifest.files, *(shard.file for shard in manifest.shards)}
    else:
        expected, _ = read_label_list(folder)
        _check_listed(folder, expected, files, report)
        files = [name for name in files if name.endswith(".npy") or is_image_name(name)]
    _check_stray(folder, expected, files, report)
    _, rows, labels, sources = open_set(folder)
    _check_labels(folder, manifest, labels, sources, report)
    return _check_rows(folder, manifest, rows, report)


def _kind(manifest, folder):
    """What a set holds; without a manifest its name says so."""
    if manifest is not None:
        return manifest.kind or "moments"
    return "images" if folder.name == IMAGES else "moments"


def _check_manifest(manifest, report):
    """The manifest against itself: the job's ticket repeats what matters."""
    with report.catch("manifest"):
        _check_ticket(manifest, report)
    spec, names = manifest.latents, manifest.class_names
    if manifest.kind == "moments" and spec is None:
        report.add("wrong VAE", f"{manifest.path} does not say which VAE made the latents; encode again")
    if spec is not None and spec.family != vae_family(spec.vae):
        report.add("wrong VAE", f"{manifest.path}: VAE {spec.vae} is not of the family {spec.family}")
    if names and (list(names) != sorted(set(names)) or len(names) != manifest.num_classes):
        report.add("class order", f"{manifest.path}: class names are not {manifest.num_classes} sorted names")
    odd = [name for name in names or () if not WORDNET.fullmatch(name)]
    if odd and len(names) == 1000 and len(odd) < 500:
        report.add("class order", f"{manifest.path}: {odd[0]} is not a WordNet id, as ImageNet's classes are")


def _check_ticket(manifest, report):
    ticket = manifest.job
    for key in ("kind", "flipped"):
        if key in ticket and ticket[key] != getattr(manifest, key):
            report.add("manifest", f"{manifest.path}: {key} is {getattr(manifest, key)}, the job says {ticket[key]}")
    try:
        latents = read_latents(ticket["latents"]) if "latents" in ticket else manifest.latents
    except ValueError as error:
        raise InputError(f"{manifest.path}: the job's latents are not {error}; encode again") from None
    if latents != manifest.latents:
        report.add("wrong VAE", f"{manifest.path}: latents is {manifest.latents}, but the job says {latents}")


def _check_checksums(folder, manifest, report):
    for shard in tqdm(manifest.shards, unit="shard", desc=f"checksums {folder.name}"):
        _check_sum(folder / shard.file, shard.sha256, report)
    for name, expected in manifest.files.items():
        _check_sum(folder / name, expected, report)


def _check_sum(path, expected, report):
    if not path.is_file():
        report.add("missing", f"{path} is missing, though {MANIFEST} lists it")
    elif sha256_of_files(path) != expected:
        report.add("checksum", f"{path} differs from the checksum in {MANIFEST}")


def _check_listed(folder, names, files, report):
    present = set(files)
    for name in names or ():
        if name not in present:
            report.add("missing", f"{folder / name} is missing, though {LABELS_JSON} lists it")


def _check_stray(folder, expected, files, report):
    """Files that published readers would take for data, or that a packed set does not have; expected None: any."""
    known = set(files if expected is None else expected)
    for name in files:
        if name not in known:
            report.add("stray file", f"{folder / name} belongs to no entry; readers that pair by order shift by it")


def _check_labels(folder, manifest, labels, sources, report):
    classes = manifest and manifest.num_classes
    if labels is None:
        captioned = (folder.parent / TEXT).is_dir()  # captions beside them are the condition
        if _kind(manifest, folder) == "moments" and not captioned:
            report.add("labels", f"{folder} has no labels (null)")
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= classes if classes else False))
    if len(wrong):
        name = sources[int(wrong[0])] if sources is not None else f"row {wrong[0]}"
        report.add("label range", f"{folder}: label {labels[wrong[0]]} of {name} is not in 0..{(classes or 0) - 1}")


def _check_rows(folder, manifest, rows, report):
    """Shape, finite values and statistics of every row, a batch at a time."""
    total = square = count = 0.0
    buffer = np.empty((BATCH, *rows.shape), rows.dtype)
    moments, channels = _kind(manifest, folder) == "moments", rows.shape[0] // 2
    for batch in tqdm(Batches(len(rows), BATCH), unit="batch", desc=f"values {folder.name}"):
        values = _read_finite(folder, rows, batch, buffer, report)
        if not moments or not len(values):
            continue
        mean, std = values[:, :channels], values[:, channels:]
        if (std < 0).any():
            report.add("negative std", f"{folder}: a std is negative; these are not moments (mean, std)")
        total, square, count = total + mean.sum(), square + (mean**2 + std**2).sum(), count + mean.size
    if moments and count and manifest is not None and manifest.latents is not None:
        _check_statistics(folder, manifest.latents, total / count, square / count, report)


def _read_finite(folder, rows, batch, buffer, report):
    """float64 values of the rows of a batch that are readable or zero, and finite."""
    for k, index in enumerate(batch):
        buffer[k] = 0
        with report.catch("unreadable row"):
            rows.read(index, buffer[k])
    values = buffer[: len(batch)].astype(np.float64)
    finite = np.isfinite(values).reshape(len(batch), -1).all(axis=1)
    for k in np.flatnonzero(~finite).tolist():
        name = f" ({rows.names[batch[k]]})" if hasattr(rows, "names") else ""
        report.add("not finite", f"{folder}: row {batch[k]}{name} holds NaN or inf")
    return values[finite]


def _check_statistics(folder, spec, mean, square, report):
    """Mean and std of latents as the network sees them: near 0 and 1 with the right scale and shift."""
    std = float(np.sqrt(max(square - mean**2, 0))) * spec.scale
    mean = (mean - spec.shift) * spec.scale
    print(f"{folder}: scaled latents have mean {mean:.3f} and std {std:.3f}")
    if not WIDE[0] < std < WIDE[1] or abs(mean) > WIDE[1] / 2:
        report.add(
            "statistics",
            f"{folder}: scaled latents have mean {mean:.3f}, std {std:.3f} instead of about 0 and 1; "
            f"is {spec.vae} at scale {spec.scale} right, and were they stored unscaled?",
        )


def _verify_images(folder, manifest, files, report, decode):
    """Image files: listed ones exist with the right size, no others; labels agree with the class folders."""
    names, labels = read_label_list(folder)
    _check_listed(folder, names, files, report)
    present = list(filter(is_image_name, files))
    _check_stray(folder, names, present, report)
    count = len(present if names is None else names)
    if manifest is not None and manifest.count != count:
        report.add("count", f"{folder} holds {count} images, {MANIFEST} says {manifest.count}")
    if names is not None and manifest is not None:
        sources = Names(folder / NAMES, len(names))
        _check_labels(folder, manifest, labels, sources, report)
        _check_class_folders(folder, manifest.class_names, labels, sources, report)
    side = manifest and manifest.resolution
    for name in tqdm(present, unit="img", desc=folder.name):
        try:
            with Image.open(folder / name) as image:
                if decode:
                    image.load()
                side = side or image.width
                if image.size != (side, side):
                    report.add("image size", f"{folder / name} is {image.width}x{image.height}, not {side}x{side}")
        except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
            report.add("unreadable image", f"{folder / name}: {error}")


def _check_class_folders(folder, class_names, labels, sources, report):
    """A source name's top folder, where it is a class, says its label."""
    index = {name: i for i, name in enumerate(class_names or ())}
    for source, label in zip(sources, labels.tolist(), strict=True):
        expected = index.get(class_of(source), label)
        if expected != label:
            report.add("label", f"{folder}: {source} has label {label}, its folder is class {expected}")


def _check_pairs(images, latents, report):
    """Images against latents: the same names (or, without a manifest, the same number) and labels."""
    if not images.is_dir() or not is_set(latents) or is_unfinished(latents):
        return
    manifest, rows, labels, sources = open_set(latents)
    names, image_labels = read_label_list(images) if (images / LABELS_JSON).is_file() else (None, None)
    if names is None:
        names = image_files(images)
    left_out = manifest.left_out if manifest else ()
    if len(names) != len(rows) and (sources is None or len(names) != len(rows) + len(left_out)):
        report.add("count", f"{images} holds {len(names)} images, {latents} {len(rows)} latents")
    label_of = dict.fromkeys(names) if image_labels is None else dict(zip(names, image_labels.tolist(), strict=True))
    expected = list(names if sources is None else sources)
    expected += [None] * (len(rows) - len(expected))
    for k, name in enumerate(expected[: len(rows)]):
        if name not in label_of:
            report.add("pairs", f"{latents}: row {k} is of {name}, which {images} does not have")
        elif labels is not None and image_labels is not None and label_of[name] != labels[k]:
            report.add("labels differ", f"{name} has label {label_of[name]} in {images}, {labels[k]} in {latents}")


def image_files(folder):
    """Sorted names of the image files under a folder."""
    return sorted(name for name, _ in walk(folder) if is_image_name(name))


def _check_vae(folders, vae, sample, report):
    """The VAE of --vae against manifests, and a sample of images encoded again."""
    codec = LatentCodec.load(vae)
    for folder in folders:
        with report.catch("wrong VAE"):
            manifest = DataManifest.read(folder)
            if _kind(manifest, folder) != "moments":
                continue
            if manifest is not None and manifest.latents is not None:
                manifest.latents.check_same(codec.spec, str(folder), "--vae")
            _encode_again(folder, manifest, codec, sample, report)


def _encode_again(folder, manifest, codec, sample, report):
    """Encode evenly spaced images again and compare: finds latents that belong to another image or VAE."""
    _, rows, _, sources = open_set(folder)
    images = folder.parent / IMAGES
    if not images.is_dir():
        return
    names = sources or image_files(images)
    flipped = manifest and manifest.flipped
    mirrored = folder.name == MIRROR if flipped is None else flipped
    row = np.empty(rows.shape, rows.dtype)
    for index in np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(int)).tolist():
        rows.read(index, row)
        with Image.open(images / names[index]) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None, :, :, :: -1 if mirrored else 1]
        again = codec.encode(torch.from_numpy(np.ascontiguousarray(pixels)))[0].numpy()
        if again.shape != row.shape:
            report.add("wrong VAE", f"{folder}: {names[index]} encodes to {again.shape}, stored is {row.shape}")
            continue
        error = float(np.sqrt(np.mean((again - row) ** 2) / np.mean(again**2)))
        if not error < REENCODED:
            report.add("pairs", f"{folder}: row {index} is not what {names[index]} encodes to (difference {error:.2f})")
