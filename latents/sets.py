"""Sets of a data folder: where they are, opening them, and what must fit the moments (mirror, images, features).

A data folder holds sets: `vae-sd` (moments), optionally `images`, `vae-sd-mirror` (moments of the flipped images),
`features-NAME` (of an encoder, for alignment) and `text` (of captions).
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

import models
from common.errors import InputError, note
from common.files import read_bytes
from common.flags import CLASSES
from latents.manifest import CHECK, IMAGES, LABELS, LABELS_JSON, MANIFEST, MIRROR, MOMENTS, NAMES, PREPARE, DataManifest
from latents.names import (
    NO_LABEL,
    Names,
    fingerprint,
    label_by_folder,
    parse_label_list,
    read_label_list,
    walk,
    walk_files,
)
from latents.rows import FolderRows, ImageFiles, PackedRows, StoredRows, read_array
from models.specs import LatentSpec, resolve_vae, vae_family

MIRROR_AGAIN = "make it again with preprocessing/dataset_tools.py mirror"
PARTIAL = ".partial"  # folder in a set that is not finished


def is_set(folder):
    """True where a folder is one set itself, not a data folder of sets."""
    return any((Path(folder) / name).is_file() for name in (MANIFEST, LABELS_JSON))


def is_unfinished(folder):
    """True where a preprocessing command has begun to fill a folder and has not finished."""
    return (Path(folder) / PARTIAL).is_dir()


def check_finished(folder):
    """Raise InputError if is_unfinished: files of an earlier run may look like a complete set."""
    if is_unfinished(folder):
        raise InputError(f"{folder} is not finished; run the same preprocessing command again, it resumes")


def list_sets(data_dir):
    """Folders of all sets of a data folder, finished or not; only the folder itself where it is one set."""
    data_dir = Path(data_dir)
    found = [folder for folder in (data_dir, *sorted(data_dir.iterdir())) if is_set(folder) or is_unfinished(folder)]
    return found[:1] if found[:1] == [data_dir] else found


def check_unpacked(place, flag):
    """Raise InputError if moments are still in the zip that REPA's tools write: the file `place`, or one in it."""
    place = Path(place)
    for path in (place, place / f"{MOMENTS}.zip"):
        if path.suffix.lower() == ".zip" and path.is_file():
            raise InputError(f"{flag} {path} is a zip; unpack it into DATA/{MOMENTS}, then pass {flag} DATA")


def find_set(data_dir, name):
    """Folder of the set `name`: DATA/name, or DATA where the set itself is named. Raises InputError without one."""
    data_dir = Path(data_dir)
    for folder in (data_dir / name, data_dir):
        check_finished(folder)
        if is_set(folder):
            return folder
    check_unpacked(data_dir, "--data-dir")
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} does not exist; {PREPARE}")
    raise InputError(f"--data-dir {data_dir} has no {name}/{LABELS_JSON} and no {MANIFEST}; {PREPARE}")


def find_features(data_dir, name):
    """Folder of the features of an encoder, `features-NAME` beside the moments; None where there is none."""
    data_dir = Path(data_dir)
    place = (data_dir.parent if is_set(data_dir) else data_dir) / f"features-{name}"
    return place if place.is_dir() else None


def open_set(folder):
    """(DataManifest or None, rows, labels int64 (N,) or None, names of the source images or None) of one set."""
    folder = Path(folder)
    check_finished(folder)
    manifest = DataManifest.read(folder)
    open_layout = _open_packed if manifest is not None and manifest.is_packed else _open_folder
    return manifest, *open_layout(folder, manifest)


def _open_folder(folder, manifest):
    names, labels = read_label_list(folder)
    if names is None:
        names = walk_files(folder, {".npy"})
        if manifest is not None and manifest.num_classes == 1:
            labels = np.zeros(len(names), np.int64)  # one class: published tools write null
    if not names:
        raise InputError(f"{folder} holds no latents; {PREPARE}")
    if not names[0].endswith(".npy"):
        raise InputError(f"{folder} holds {names[0]}, not latents (.npy); name a folder of latents, or {PREPARE}")
    if manifest is not None and manifest.count != len(names):
        raise InputError(f"{folder} holds {len(names)} latents, its {MANIFEST} says {manifest.count}; {CHECK}")
    sources = Names(folder / NAMES, len(names)) if manifest is not None else None
    return FolderRows(folder, names), labels, sources


def _open_packed(folder, manifest):
    count = manifest.count
    if not count:
        raise InputError(f"{folder} holds no rows; {PREPARE}")
    labels = read_array(folder / LABELS, "pack again") if LABELS in manifest.files else None
    if labels is not None and (labels.shape, labels.dtype) != ((count,), np.int64):
        raise InputError(f"{folder / LABELS} holds {labels.dtype} {labels.shape}, not {count} labels; pack again")
    if labels is not None and manifest.kind != "captions" and labels.max() >= CLASSES.high:  # captions': image numbers
        raise InputError(f"{folder / LABELS} holds label {labels.max()}, above {CLASSES.high}; pack again")
    return PackedRows(manifest), labels, Names(folder / NAMES, count)


@dataclasses.dataclass(frozen=True)
class Moments:
    """The moments of a data folder as open_set gives them, and the VAE that made them; the manifest may be empty."""

    folder: Path
    manifest: DataManifest
    rows: FolderRows | PackedRows
    labels: np.ndarray | None
    names: Names | None
    spec: LatentSpec

    def __post_init__(self):
        shape, channels = self.rows.shape, 2 * self.spec.channels
        if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2]:
            needed = f"({channels}, h, h): mean and std by {self.spec.vae}"
            remedy = "encode the images again, or name the right VAE with --data-vae"
            raise InputError(f"{self.folder}: latents have shape {shape}, not {needed}; {remedy}")

    @property
    def resolution(self):
        """Side of the images."""
        return self.rows.shape[1] * self.spec.factor

    @property
    def row_names(self):
        """Names of the images, or of the latents' files where nothing tells the images'."""
        return self.rows.names if self.names is None else self.names

    @property
    def labels_file(self):
        """Where the labels are."""
        return self.folder / (LABELS if self.manifest.is_packed else LABELS_JSON)

    def has_images(self, images):
        """False where the moments were made from other images than the set with the fingerprint `images`."""
        return self.manifest.image_set in (None, images)

    def check_pairs_are_known(self):
        """Raise InputError if the names are of latents instead of the images that they were made from."""
        if self.names is not None and self.names[0].endswith(".npy"):
            raise InputError(f"{self.folder} was packed without the images beside it, so pairs are unknown; pack again")


def open_moments(data_dir, data_vae=None):
    """Moments of a data folder; data_vae: the VAE (name or folder) where no manifest names it. Raises InputError."""
    folder = find_set(data_dir, MOMENTS)
    manifest, rows, labels, names = open_set(folder)
    given = spec_of_vae(data_vae) if data_vae else None
    spec = manifest.moments_spec() if manifest is not None else given or LatentSpec()
    if given:
        spec.check_same(given.scaled_as(spec), str(folder), "--data-vae")
    elif manifest is None:
        note(f"warning: {folder} has no {MANIFEST}; taken as {spec.family} at scale {spec.scale} (others: --data-vae)")
    return Moments(folder, manifest or DataManifest(count=len(rows)), rows, labels, names, spec)


def spec_of_vae(name):
    """LatentSpec of a VAE by name or folder; only families that are not known by name are loaded."""
    path = resolve_vae(name)
    if vae_family(path) == LatentSpec.family and not Path(path).is_dir():
        return LatentSpec(vae=path)
    return models.codec.LatentCodec.load(name).spec


def check_labels(labels, num_classes, where):
    """Raise InputError unless every label is in 0..num_classes − 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        fault = f"label {wrong[0]} is out of range for {num_classes} classes"
        raise InputError(f"{where}: {fault}; correct the labels or --num-classes; {CHECK}")


def open_mirror(moments):
    """Rows of the moments of the flipped images. Raises InputError unless they fit the Moments."""
    folder = moments.folder.parent / MIRROR
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; encode it with preprocessing/dataset_tools.py mirror")
    manifest, rows, _, _ = open_set(folder)
    found, expected = (len(rows), rows.shape), (len(moments.rows), moments.rows.shape)
    if found != expected:
        raise InputError(f"{folder} holds rows of {found}, {MOMENTS} of {expected}; encode it again")
    if manifest is not None:
        if manifest.flipped is False and manifest.job.get("command") == "encode":  # older `pack`: always
            raise InputError(f"{folder} was made without flipping the images; {MIRROR_AGAIN}")
        moments.spec.check_same(manifest.moments_spec().scaled_as(moments.spec), MOMENTS, str(folder))
        if manifest.image_set and not moments.has_images(manifest.image_set):
            raise InputError(f"{folder} was made from other images than {moments.folder}; {MIRROR_AGAIN}")
    return rows


def open_images(moments):
    """ImageFiles of the Moments. Raises InputError."""
    root = moments.folder.parent / IMAGES
    if not root.is_dir():
        raise InputError(f"{root} is missing and images are needed; link the converted images there")
    check_finished(root)
    moments.check_pairs_are_known()
    names = images_by_order(root, len(moments.rows)) if moments.names is None else moments.names
    if os.environ.get("RANK", "0") == "0" and not _are_of(moments, root, names):  # it reads the size of every file
        remedy = "put those there, or encode these into a new folder"
        raise InputError(f"{root} holds other images or labels than {moments.folder} was made from; {remedy}")
    return ImageFiles(root, names.__getitem__, moments.resolution)


def _are_of(moments, root, names):
    """False if the records show that the Moments were not made from the images `names` of the folder `root`."""
    listed, path = {}, root / LABELS_JSON
    if path.is_file():
        found, labels = parse_label_list(read_bytes(path, PREPARE), path)
        listed = dict(zip(found, labels.tolist(), strict=True)) if found else {}
    sizes = {name: size for name, (size, _) in walk(root)} if moments.manifest.image_set else {}
    left_out = [name for name, _ in moments.manifest.left_out]
    if not sizes or not sizes.keys() >= set(left_out):  # what was left out may have been deleted since
        pairs = () if moments.labels is None else zip(names, moments.labels.tolist(), strict=True)
        return all(listed.get(name, label) in (label, NO_LABEL) for name, label in pairs)
    encoded = sorted([*names, *left_out])
    # without a list, encoding found no labels, or took the folders' (published treatment, class folders)
    for label_of in [listed] if listed else [{}, _labels_by_folder(root)]:
        labels = [label_of.get(name, NO_LABEL) for name in encoded]
        if moments.has_images(fingerprint(encoded, map(sizes.get, encoded), labels)):
            return True
    return False


def _labels_by_folder(root):
    from PIL import Image  # only alignment and preprocessing read images

    names = walk_files(root, Image.registered_extensions())
    return dict(zip(names, label_by_folder(names)[0].tolist(), strict=True))


def images_by_order(folder, count):
    """Sorted names of `count` image files: as published, the i-th belongs to the i-th latent. Raises InputError."""
    from PIL import Image  # only alignment and preprocessing read images

    check_finished(folder)
    names = walk_files(folder, Image.registered_extensions())
    if len(names) != count:
        pairs = f"without a {MANIFEST} they are paired by order"
        raise InputError(f"{folder} holds {len(names)} images for {count} latents, and {pairs}; move stray files away")
    return names


def open_features(data_dir, encoder, moments, mirror=False):
    """StoredRows of an encoder's features; mirror: and of the mirrored images'. Raises InputError if they misfit."""
    place = find_features(data_dir, encoder)
    twin = place.with_name(place.name + "-mirror")
    if mirror and not twin.is_dir():
        remedy = f"write it with dataset_tools.py features --mirror, or move {place} away to compute while training"
        raise InputError(f"--mirror: {twin} is missing; {remedy}")
    rows = _open_features(place, encoder, moments, flipped=False)
    return StoredRows(rows, _open_features(twin, encoder, moments, flipped=True) if mirror else None)


def _open_features(place, encoder, moments, flipped):
    manifest, rows, _, names = open_set(find_set(place, "."))
    remedy = "write the features again, or move it away"
    found = manifest and manifest.encoder and (manifest.encoder.name, manifest.flipped, len(rows))
    if found != (expected := (encoder, flipped, len(moments.rows))):
        raise InputError(f"{place}: its encoder, flip and number of images are {found}, not {expected}; {remedy}")
    moments.check_pairs_are_known()
    if not moments.has_images(manifest.image_set) or (moments.names and not moments.names.same(names)):
        raise InputError(f"{place} holds features of other images than {moments.folder} was made from; {remedy}")
    return rows
