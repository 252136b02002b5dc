"""Sets of a data folder: where they are, opening them, and what must fit the moments (mirror, images, features).

A data folder holds sets: `vae-sd` (moments), optionally `images`, `vae-sd-mirror` (moments of the flipped images),
`features-NAME` (of an encoder, for alignment) and `text` (of captions).
"""

import dataclasses
from pathlib import Path

import numpy as np

from common.errors import InputError
from latents.manifest import (
    CHECK,
    FEATURES,
    IMAGES,
    LABELS,
    LABELS_JSON,
    MANIFEST,
    MIRROR,
    MOMENTS,
    NAMES,
    PARTIAL,
    PREPARE,
    DataManifest,
)
from latents.names import Names, read_label_list, walk_files
from latents.rows import FolderRows, ImageFiles, PackedRows, StoredRows

# ---------------------------------------------------------------------------------------------------------- finding


def is_set(folder):
    """True where a folder is one set itself, not a data folder of sets."""
    return any((Path(folder) / name).is_file() for name in (MANIFEST, LABELS_JSON))


def is_unfinished(folder):
    """True where a preprocessing command has begun to fill a folder and has not finished."""
    return (Path(folder) / PARTIAL).is_dir()


def list_sets(data_dir):
    """Folders of all sets of a data folder, finished or not, sorted; only the folder itself where it is one set."""
    data_dir = Path(data_dir)
    found = [folder for folder in (data_dir, *sorted(data_dir.iterdir())) if is_set(folder) or is_unfinished(folder)]
    return found[:1] if found[:1] == [data_dir] else found


def find_set(data_dir, name):
    """Folder of the set `name`: DATA/name, or DATA where the set itself is named. Raises InputError without one."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data-dir {data_dir} does not exist; {PREPARE}")
    folders = (data_dir / name, data_dir)
    if folder := next(filter(is_set, folders), None):
        return folder
    if folder := next(filter(is_unfinished, folders), None):
        raise InputError(f"{folder} is not finished; run the same preprocessing command again, it resumes")
    raise InputError(f"--data-dir {data_dir} has no {name}/{LABELS_JSON} and no {MANIFEST}; {PREPARE}")


def find_features(data_dir, name):
    """Folder of the features of an encoder, `features-NAME` beside the moments; None where there is none."""
    try:
        place = find_set(data_dir, MOMENTS).parent / f"{FEATURES}{name}"
    except InputError:  # what is wrong is said where the moments are opened
        return None
    return place if place.is_dir() else None


# ---------------------------------------------------------------------------------------------------------- opening


def open_set(folder):
    """(DataManifest or None, rows, labels int64 (N,) or None, names of the source images or None) of one set."""
    folder = Path(folder)
    manifest = DataManifest.read(folder)
    if manifest is not None and manifest.is_packed:
        return manifest, *_open_packed(folder, manifest)
    return manifest, *_open_folder(folder, manifest)


def _open_folder(folder, manifest):
    names, labels = read_label_list(folder)
    if names is None:
        names = walk_files(folder, {".npy"})
        if manifest is not None and manifest.num_classes == 1:
            labels = np.zeros(len(names), np.int64)  # one class: published tools write null
    if not names:
        raise InputError(f"{folder} holds no latents; {PREPARE}")
    if manifest is not None and manifest.count != len(names):
        raise InputError(f"{folder} holds {len(names)} latents, its {MANIFEST} says {manifest.count}; {CHECK}")
    sources = Names(folder / NAMES, len(names)) if manifest is not None else None
    return FolderRows(folder, names), labels, sources


def _open_packed(folder, manifest):
    if not manifest.count:
        raise InputError(f"{folder} holds no rows; {PREPARE}")
    labels = _open_labels(folder / LABELS, manifest.count) if LABELS in manifest.files else None
    return PackedRows(manifest), labels, Names(folder / NAMES, manifest.count)


def _open_labels(path, count):
    try:
        labels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: labels are missing or unreadable ({error}); pack again") from None
    if labels.shape != (count,) or labels.dtype != np.int64:
        raise InputError(f"{path} holds {labels.dtype} {labels.shape}, not {count} labels; pack again")
    return labels


def check_labels(labels, num_classes, where):
    """Raise InputError unless every label is in 0..num_classes − 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise InputError(
            f"{where}: label {wrong[0]} is out of range for {num_classes} classes (0..{num_classes - 1}); "
            f"correct the labels or --num-classes; {CHECK}"
        )


# ------------------------------------------------------------------------------------------ what belongs to the moments


def open_mirror(data_dir, info):
    """Rows of the moments of the flipped images. Raises InputError unless they fit `info`, a DataInfo."""
    folder = Path(data_dir) / MIRROR
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; encode it with preprocessing/dataset_tools.py mirror")
    manifest, rows, _, _ = open_set(folder)
    if len(rows) != info.count or rows.shape != info.moments_shape:
        raise InputError(
            f"{folder} holds {len(rows)} of {rows.shape}, not {info.count} of {info.moments_shape}; encode it again"
        )
    if manifest is not None:
        info.spec.check_same(manifest.moments_spec(), MOMENTS, str(folder))
    return rows


def open_images(data_dir, folder, names, info):
    """ImageFiles of the moments in `folder`. Raises InputError."""
    root = next((f for f in (Path(data_dir) / IMAGES, folder.parent / IMAGES) if f.is_dir()), None)
    if root is None:
        raise InputError(f"{Path(data_dir) / IMAGES} is missing and images are needed; link the converted images there")
    check_pairs_are_known(folder, names)
    if names is None:
        names = images_by_order(root, info.count)
    return ImageFiles(root, names.__getitem__, info.resolution)


def images_by_order(folder, count):
    """Sorted names of `count` image files: as published, the i-th belongs to the i-th latent. Raises InputError."""
    from PIL import Image  # only alignment and preprocessing read images

    Image.init()
    names = walk_files(folder, Image.EXTENSION.keys())
    if len(names) != count:
        raise InputError(
            f"{folder} holds {len(names)} images for {count} latents, and without a {MANIFEST} they are paired by "
            f"order; remove the stray files; {CHECK}"
        )
    return names


def check_pairs_are_known(folder, names):
    """Raise InputError where a set of moments names latents instead of the images that they were made from."""
    if names is not None and names[0].endswith(".npy"):
        raise InputError(f"{folder} was packed without the images beside it, so pairs are unknown; pack again")


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What the features must share with the moments in `folder`: the image set, names (or None: by order), count."""

    folder: Path
    images: str | None
    names: Names | None
    count: int


def open_features(data_dir, encoders, pairing, mirror=False):
    """{encoder: StoredRows} of the features of these encoders. Raises InputError where they do not fit the moments."""
    return {name: _open_features(find_features(data_dir, name), name, pairing, mirror) for name in encoders}


def _open_features(place, name, pairing, mirror):
    """StoredRows of the features of encoder `name`, and of the mirrored images' where `mirror`."""
    rows = _open_feature_set(place, name, pairing, flipped=False)
    twin = place.with_name(place.name + "-mirror")
    if mirror and not twin.is_dir():
        raise InputError(
            f"--mirror: {twin} is missing; write it with preprocessing/dataset_tools.py features --mirror, or move "
            f"{place} away to compute features while training"
        )
    return StoredRows(rows, _open_feature_set(twin, name, pairing, flipped=True) if mirror else None)


def _open_feature_set(place, name, pairing, flipped):
    manifest, rows, _, names = open_set(find_set(place, "."))
    encoder = manifest and manifest.encoder
    facts = {
        "encoder": (encoder and encoder.name, name),
        "flipped images": (manifest and manifest.flipped, flipped),
        "number of images": (len(rows), pairing.count),
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise InputError(
                f"{place}: its {what} is {found}, not {expected}; write the features again, or move it away"
            )
    check_pairs_are_known(pairing.folder, pairing.names)
    other_images = pairing.images not in (None, manifest.image_set)
    if other_images or (pairing.names is not None and not pairing.names.same(names)):
        raise InputError(
            f"{place} holds features of other images than {pairing.folder} was made from; write the features again, "
            "or move it away"
        )
    return rows
