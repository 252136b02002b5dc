"""Training on a folder of images, which are converted and encoded once into a data folder beside it."""

import dataclasses
import os
import time
from pathlib import Path

from common.errors import InputError, note
from common.files import locked
from common.processes import Processes
from latents.manifest import IMAGES, MANIFEST, MOMENTS, DataManifest
from latents.names import walk
from latents.sets import list_sets
from models.specs import DEFAULT_VAE, resolve_vae
from preprocessing.convert import convert
from preprocessing.encode import encode
from preprocessing.options import ConvertFlags, EncodeFlags
from preprocessing.sources import ImageSource, is_image_name

MOST = 100_000  # images; the commands encode larger sets on all GPUs


def with_latents(config):
    """A configuration; if --data-dir holds images, it is replaced by a data folder made from them.

    The first process makes the data folder while the others wait. Raises InputError.
    """
    folder = Path(config.data_dir)
    if not folder.is_dir() or not _is_of_images(folder):
        return config
    if config.resolution is None:
        raise InputError(f"--data-dir {folder} holds images; pass --resolution, the size at which to encode them")
    vae = config.data_vae or DEFAULT_VAE
    place = folder.resolve() if folder.name in ("", "..") else folder
    data = place.parent / f"{place.name}-latents-{config.resolution}-{Path(resolve_vae(vae)).name}"
    done = data / MOMENTS / MANIFEST
    if config.dry_run and not done.is_file():
        raise InputError(f"--data-dir {folder} holds images that are not encoded yet; run without --dry-run first")
    if os.environ.get("RANK", "0") == "0":
        _check(folder, data)
        if not done.is_file():
            with locked(data, "--data-dir"):
                _encode(folder, data, config.resolution, vae)
    while not done.is_file():
        time.sleep(1)  # if the first process fails, the launcher ends this one
    return dataclasses.replace(config, data_dir=str(data))


def _is_of_images(folder):
    """Whether a folder holds images and neither sets of a data folder nor arrays."""
    if (folder / MOMENTS).exists() or list_sets(folder):
        return False
    names = [name for name, _ in walk(folder)]
    return any(map(is_image_name, names)) and not any(name.endswith(".npy") for name in names)


def _check(folder, data):
    """Raise InputError for too many images, images without classes, or other ones than `data` was made from."""
    images = ImageSource(folder, flag="--data-dir")
    if len(images) > MOST:
        remedy = "prepare them with python -m preprocessing.dataset_tools convert, then encode"
        raise InputError(f"--data-dir {folder} holds {len(images):,} images, more than {MOST:,}; {remedy}")
    if not images.num_classes:
        raise InputError(f"--data-dir {folder}: images lie in no class folder; make a folder per class (one is enough)")
    made = DataManifest.read(data / IMAGES)
    if made and made.job.get("source") != images.fingerprint():
        remedy = f"delete {data} to encode them again, or pass --data-dir {data}"
        raise InputError(f"the images in --data-dir {folder} have changed since they were encoded; {remedy}")


def _encode(folder, data, side, vae):
    note(f"--data-dir {folder} holds images; they are encoded once, at {side}x{side} with {vae}, into {data}")
    try:
        convert(ConvertFlags(str(folder), str(data / IMAGES), (side, side)))
        encode(EncodeFlags(str(data / IMAGES), str(data / MOMENTS), vae, packed=True), Processes.alone())
    except InputError as error:
        raise InputError(f"--data-dir {folder} cannot be encoded into {data}: {error}") from None
