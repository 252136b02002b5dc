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
        mean, log_variance = np.split(super()._load(name), 2)
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, -30, 20))])


def is_foreign(data_dir):
    """True for a folder of {i}.npy and {i}_{k}.npy with empty_context.npy beside it or in it."""
    return find_empty(data_dir) is not None and (Path(data_dir) / "0.npy").is_file()


def find_empty(data_dir):
    """empty_context.npy in the folder or beside it, else None."""
    folder = Path(data_dir).resolve()
    return next((f / FOREIGN_EMPTY for f in (folder, folder.parent) if (f / FOREIGN_EMPTY).is_file()), None)


def list_foreign(folder):
    """(N, [(i, k), …] sorted) of the files {i}.npy and {i}_{k}.npy. Raises InputError where a number is missing."""
    found, pairs = set(), []
    for path in Path(folder).glob("*.npy"):
        if match := re.fullmatch(r"(\d+)(?:_(\d+))?", path.stem):
            i, k = match.groups()
            found.add(int(i)) if k is None else pairs.append((int(i), int(k)))
    if missing := set(range(len(found))) - found:
        raise InputError(f"{folder}/{min(missing)}.npy is missing: latents are numbered from 0 on; restore it")
    captioned = {i for i, _ in pairs}
    if missing := found - captioned:
        raise InputError(f"{folder}/{min(missing)}.npy has no caption ({min(missing)}_0.npy); restore it")
    if stray := captioned - found:
        raise InputError(f"{folder}/{min(stray)}_0.npy is a caption without an image ({min(stray)}.npy); restore it")
    return len(found), sorted(pairs)


class CaptionFiles:
    """Texts {i}_{k}.txt; captions[row] is "" where there is no file, as U-ViT writes none."""

    def __init__(self, folder, pairs):
        self.folder, self.pairs = Path(folder), pairs

    def __getitem__(self, row):
        path = self.folder / "{}_{}.txt".format(*self.pairs[row])
        return " ".join(path.read_text("utf-8", "replace").split()) if path.is_file() else ""
