"""Tiny images, feature extractors and files for the tests of evaluations/."""

import json
import warnings

import numpy as np
import torch


class Corners(torch.nn.Module):
    """uint8 (N, 3, H, W) → (N, 12): mean colour of each quarter."""

    def forward(self, images: torch.Tensor):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, [2, 2]).flatten(1)


class Broken(torch.nn.Module):
    """NaN for images with a black first pixel, as a damaged network would give."""

    def forward(self, images: torch.Tensor):
        first = images[:, :, 0, 0].float()
        return torch.cat([first, first.sum(1, keepdim=True).log() * 0], 1)


class Wrong(torch.nn.Module):
    """Four dimensions instead of two."""

    def forward(self, images: torch.Tensor):
        return images.float()


def script(path, network=None):
    """Write a TorchScript file; returns its path as text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network or Corners()).save(str(path))
    return str(path)


def pictures(count, seed, size=16):
    """uint8 (N, size, size, 3) of random smooth colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def save_npz(path, images, manifest=None, **arrays):
    """Write arr_0 and further arrays, and the manifest beside it; returns the path as text."""
    np.savez(path, arr_0=images, **arrays)
    if manifest is not None:
        path.with_suffix(".json").write_text(json.dumps(manifest))
    return str(path)


def numbers(text):
    """{label: number} of the lines `label: number`."""
    pairs = [line.rsplit(": ", 1) for line in text.splitlines() if ": " in line]
    return {name: float(value) for name, value in pairs}
