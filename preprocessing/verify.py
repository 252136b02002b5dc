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
from latents.manifest import (
    IMAGES,
    LABELS_JSON,
    MANIFEST,
    MIRROR,
    MOMENTS,
    NAMES,
    is_packed,
    read_manifest,
    spec_from_manifest,
)
from latents.names import Names, read_label_list
from latents.sets import open_set
from listing import NameTable, walk
from models.codec import LatentCodec, vae_family
from preprocessing.jobs import PARTIAL, Batches
from preprocessing.sources import class_of, is_image_name

BATCH = 256
WIDE = (0.25, 4.0)  # std of scaled latents beyond this means another scale or VAE; it is 1 by construction
REENCODED = 0.1  # rms of the difference over rms: bf16 arithmetic stays ten times below, another image far above


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
    alone = any((data_dir / name).is_file() for name in (MANIFEST, LABELS_JSON)) or (data_dir / PARTIAL).is_dir()
    folders = [data_dir] if alone else sorted(path for path in data_dir.iterdir() if _looks_like_a_set(path))
    if not folders:
        raise InputError(f"{data_dir} holds no set (a folder with {MANIFEST} or {LABELS_JSON})")
    for folder in folders:
        if (folder / PARTIAL).exists():
            report.add("unfinished", f"{folder} is not finished: run its command again")
            continue
        with report.catch("unreadable"):
            verify_set(folder, report, decode)
    with report.catch("pairs"):
        _check_pairs(data_dir, report)
    if (data_dir / TEXT).is_dir() and (data_dir / MOMENTS).is_dir():
        with report.catch("captions"):
            open_captions(data_dir)
    if vae is not None:
        with report.catch("wrong VAE"):
            _check_vae(data_dir, folders, vae, sample, report)
    return report


def _looks_like_a_set(path):
    return path.is_dir() and any((path / name).exists() for name in (MANIFEST, LABELS_JSON, PARTIAL))


def verify_set(folder, report, decode=False):
    """Check one set by itself."""
    manifest = read_manifest(folder)
    if manifest is not None:
        with report.catch("manifest"):
            _check_manifest(folder, manifest, report)
    if (manifest or {}).get("kind") == "images" or (manifest is None and folder.name == IMAGES):
        return _verify_images(folder, manifest, report, decode)
    if is_packed(manifest):
        _check_checksums(folder, manifest, report)
        expected = {MANIFEST, *manifest["files"], *(shard["file"] for shard in manifest["shards"])}
        _check_stray(folder, expected, _table(folder), report)
    else:
        names, _ = read_label_list(folder)
        _check_listed(folder, names, _table(folder), report)
        files = _table(folder, lambda name: name.endswith(".npy") or is_image_name(name))
        _check_stray(folder, names or files, files, report)
    manifest, rows, labels, sources = open_set(folder)
    _check_labels(folder, manifest, labels, sources, report)
    return _check_rows(folder, manifest, rows, report)


def _check_manifest(folder, manifest, report):
    """The manifest against itself: the job's ticket repeats what matters."""
    ticket = manifest.get("job") or {}
    for key in ("latents", "kind", "flipped"):
        if key in ticket and ticket[key] != manifest.get(key):
            kind = "wrong VAE" if key == "latents" else "manifest"
            report.add(kind, f"{folder / MANIFEST}: {key} is {manifest.get(key)}, but it was made with {ticket[key]}")
    if manifest.get("kind") == "moments":
        spec = spec_from_manifest(manifest, folder)
        if spec.family != vae_family(spec.vae):
            report.add("wrong VAE", f"{folder / MANIFEST}: VAE {spec.vae} is not of the family {spec.family}")
    names = manifest.get("class_names")
    if names and (names != sorted(set(names)) or len(names) != manifest.get("num_classes")):
        report.add(
            "class order", f"{folder / MANIFEST}: class names are not {manifest.get('num_classes')} sorted names"
        )
    if names and len(names) == 1000 and not all(re.fullmatch(r"n\d{8}", name) for name in names):
        odd = next(name for name in names if not re.fullmatch(r"n\d{8}", name))
        if sum(bool(re.fullmatch(r"n\d{8}", name)) for name in names) > 500:
            report.add("class order", f"{folder / MANIFEST}: {odd} is no WordNet id among ImageNet's")


def _check_checksums(folder, manifest, report):
    for shard in tqdm(manifest["shards"], unit="shard", desc=f"checksums {folder.name}"):
        _check_sum(folder / shard["file"], shard["sha256"], report)
    for name, expected in manifest["files"].items():
        _check_sum(folder / name, expected, report)


def _check_sum(path, expected, report):
    if not path.is_file():
        report.add("missing", f"{path} is missing, though {MANIFEST} lists it")
    elif sha256_of_files(path) != expected:
        report.add("checksum", f"{path} differs from the checksum in {MANIFEST}")


def _table(folder, counts=lambda name: True):
    """Sorted names of the files that count."""
    return NameTable((name,) for name, _ in walk(folder) if counts(name))


def _check_listed(folder, names, files, report):
    for name in names or ():
        if name not in files:
            report.add("missing", f"{folder / name} is missing, though {LABELS_JSON} lists it")


def _check_stray(folder, expected, files, report):
    """Files that published readers would take for data, or that a packed set does not have."""
    for name in files:
        if name not in expected:
            report.add("stray file", f"{folder / name} belongs to no entry; readers that pair by order shift by it")


def _check_labels(folder, manifest, labels, sources, report):
    classes = (manifest or {}).get("num_classes")
    if labels is None:
        return report.add("labels", f"{folder} has no labels (null)") if _needs_labels(folder, manifest) else None
    wrong = np.flatnonzero((labels < 0) | (labels >= classes if classes else False))
    if len(wrong):
        name = sources[int(wrong[0])] if sources is not None else f"row {wrong[0]}"
        report.add("label range", f"{folder}: label {labels[wrong[0]]} of {name} is not in 0..{(classes or 0) - 1}")
    return None


def _needs_labels(folder, manifest):
    """Moments do, unless captions beside them are the condition."""
    return (manifest or {}).get("kind", "moments") == "moments" and not (folder.parent / TEXT).is_dir()


def _check_rows(folder, manifest, rows, report):
    """Shape, finite values and statistics of every row, a batch at a time."""
    total = square = count = 0.0
    buffer = np.empty((BATCH, *rows.shape), rows.dtype)
    moments = (manifest or {}).get("kind", "moments") == "moments"
    channels = rows.shape[0] // 2
    for batch in tqdm(Batches(len(rows), BATCH), unit="batch", desc=f"values {folder.name}"):
        for k, index in enumerate(batch):
            buffer[k] = 0
            with report.catch("unreadable row"):
                rows.read(index, buffer[k])
        values = buffer[: len(batch)].astype(np.float64)
        finite = np.isfinite(values).reshape(len(batch), -1).all(axis=1)
        for k in np.flatnonzero(~finite):
            report.add("not finite", f"{folder}: row {batch[int(k)]}{_row_name(rows, batch[int(k)])} holds NaN or inf")
        values = values[finite]
        if moments and len(values):
            if (values[:, channels:] < 0).any():
                report.add("negative std", f"{folder}: a std is negative; these are no moments (mean, std)")
            mean, std = values[:, :channels], values[:, channels:]
            total, square, count = total + mean.sum(), square + (mean**2 + std**2).sum(), count + mean.size
    if moments and count and manifest is not None:
        _check_statistics(folder, spec_from_manifest(manifest, folder), total / count, square / count, report)


def _row_name(rows, index):
    return f" ({rows.names[index]})" if hasattr(rows, "names") else ""


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


def _verify_images(folder, manifest, report, decode):
    """Image files: listed ones exist with the right size, no others; labels agree with the class folders."""
    names, labels = read_label_list(folder)
    _check_listed(folder, names, _table(folder), report)
    present = _table(folder, is_image_name)
    _check_stray(folder, names if names is not None else present, present, report)
    count = len(names if names is not None else present)
    if manifest is not None and manifest["count"] != count:
        report.add("count", f"{folder} holds {count} images, {MANIFEST} says {manifest['count']}")
    if names is not None and manifest is not None:
        sources = Names(folder / NAMES, len(names))
        _check_labels(folder, manifest, labels, sources, report)
        _check_class_folders(folder, manifest.get("class_names"), labels, sources, report)
    side = (manifest or {}).get("resolution")
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
    for k, label in enumerate(labels):
        expected = index.get(class_of(sources[k]), label)
        if expected != label:
            report.add("label", f"{folder}: {sources[k]} has label {label}, its folder is class {expected}")


def _check_pairs(data_dir, report):
    """Images against latents: the same names (or, without a manifest, the same number) and labels."""
    images, latents = data_dir / IMAGES, data_dir / MOMENTS
    if not (images.is_dir() and _looks_like_a_set(latents)) or (latents / PARTIAL).exists():
        return
    manifest, rows, labels, sources = open_set(latents)
    names, image_labels = read_label_list(images) if (images / LABELS_JSON).is_file() else (None, None)
    if names is None:
        names = _table(images, is_image_name)
    if len(names) != len(rows):
        left_out = len((manifest or {}).get("left_out", []))
        if sources is None or len(names) != len(rows) + left_out:
            report.add("count", f"{images} holds {len(names)} images, {latents} {len(rows)} latents")
    for k in range(len(rows)):
        name = sources[k] if sources is not None else (names[k] if k < len(names) else None)
        found = None if name is None else names.find(name)
        if found is None:
            report.add("pairs", f"{latents}: row {k} is of {name}, which {images} does not have")
        elif labels is not None and image_labels is not None and image_labels[found] != labels[k]:
            report.add("labels differ", f"{name} has label {image_labels[found]} in {images}, {labels[k]} in {latents}")


def _check_vae(data_dir, folders, vae, sample, report):
    """The VAE of --vae against manifests, and a sample of images encoded again."""
    codec = LatentCodec.load(vae)
    for folder in folders:
        manifest = read_manifest(folder)
        moments = (manifest or {}).get("kind", "moments") == "moments" and folder.name != IMAGES
        if not moments:
            continue
        with report.catch("wrong VAE"):
            if manifest is not None:
                spec_from_manifest(manifest, folder).check_same(codec.spec, str(folder), "--vae")
            _encode_again(folder, codec, sample, report)


def _encode_again(folder, codec, sample, report):
    """Encode evenly spaced images again and compare: finds latents that belong to another image or VAE."""
    manifest, rows, _, sources = open_set(folder)
    images = folder.parent / IMAGES
    if not images.is_dir():
        return
    names = sources or _table(images, is_image_name)
    flip = -1 if (manifest or {}).get("flipped", folder.name == MIRROR) else 1
    row = np.empty(rows.shape, rows.dtype)
    for index in np.unique(np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(int)).tolist():
        rows.read(index, row)
        with Image.open(images / names[index]) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None, :, :, ::flip]
        again = codec.encode(torch.from_numpy(np.ascontiguousarray(pixels)))[0].numpy()
        if again.shape != row.shape:
            report.add("wrong VAE", f"{folder}: {names[index]} encodes to {again.shape}, stored is {row.shape}")
            continue
        error = float(np.sqrt(np.mean((again - row) ** 2) / np.mean(again**2)))
        if not error < REENCODED:
            report.add("pairs", f"{folder}: row {index} is not what {names[index]} encodes to (difference {error:.2f})")
