"""Folders of moments and captions as U-ViT prepares them: {i}.npy, {i}_{k}.npy, {i}_{k}.txt, {i}.png, no manifest."""

import re
from pathlib import Path

import numpy as np

from common.errors import InputError
from latents.rows import FolderRows

FOREIGN_EMPTY = "empty_context.npy"  # of a folder as U-ViT prepares it; it lies beside train/ and val/


class LogVarianceRows(FolderRows):
    """Moments stored as mean and log-variance, read as mean and std."""

    def _load(self, name):
        moments = super()._load(name)
        if moments.ndim != 3 or len(moments) % 2:
            raise InputError(f"{self.folder / name} has shape {moments.shape}, not (2C, h, h); encode it again")
        mean, log_variance = np.split(moments, 2)
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, -30, 20))])


def is_foreign(data_dir):
    """True for a folder of {i}.npy and {i}_{k}.npy with empty_context.npy beside it or in it."""
    return find_empty(data_dir) is not None and (Path(data_dir) / "0.npy").is_file()


def find_empty(data_dir):
    """empty_context.npy in the folder or beside it, else None."""
    folder = Path(data_dir).resolve()
    return next((f / FOREIGN_EMPTY for f in (folder, folder.parent) if (f / FOREIGN_EMPTY).is_file()), None)


def list_foreign(folder):
    """(N, [(i, k), …] sorted) of the files {i}.npy and {i}_{k}.npy. Raises InputError if one is missing."""
    matches = (re.fullmatch(r"(\d+)(?:_(\d+))?", path.stem) for path in Path(folder).glob("*.npy"))
    numbers = [match.groups() for match in matches if match]
    images = {int(i) for i, k in numbers if k is None}
    pairs = sorted((int(i), int(k)) for i, k in numbers if k is not None)
    captioned = {i for i, _ in pairs}
    for name, found in (("{}.npy", images), ("{}_0.npy", captioned)):
        if missing := set(range(len(images | captioned))) - found:
            needed = "every image, numbered from 0 on, has a latent and captions"
            raise InputError(f"{folder}/{name.format(min(missing))} is missing: {needed}; restore it")
    return len(images), pairs


class CaptionFiles:
    """Texts {i}_{k}.txt; captions[row] is "" where there is no file, as U-ViT writes none."""

    def __init__(self, folder, pairs):
        self.folder, self.pairs = Path(folder), pairs

    def __getitem__(self, row):
        path = self.folder / "{}_{}.txt".format(*self.pairs[row])
        return " ".join(path.read_text("utf-8", "replace").split()) if path.is_file() else ""
