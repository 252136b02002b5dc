"""Mean and std of each channel of latents, accumulated over batches."""

import dataclasses
import functools

import numpy as np

from common.errors import InputError
from common.records import Finite, Whole

DIGITS = 6  # significant digits of scale and shift in the manifest


@dataclasses.dataclass(frozen=True)
class ChannelSums:
    """For each channel of latents drawn from moments: number of values, mean, and sum of squared deviations from it."""

    count: Whole
    mean: tuple[Finite, ...]
    squares: tuple[Finite, ...]

    @classmethod
    def of(cls, moments):
        """From moments (N, 2C, h, w); a draw's expected squared deviation is that of the posterior mean, plus std²."""
        mean, std = np.split(np.asarray(moments, np.float64), 2, axis=1)
        middle = mean.mean(axis=(0, 2, 3), keepdims=True)
        squares = ((mean - middle) ** 2 + std**2).sum(axis=(0, 2, 3))
        return cls(mean[:, 0].size, tuple(middle.flatten().tolist()), tuple(squares.tolist()))

    def __add__(self, other):
        """Both together, without cancellation between large sums (Chan, Golub and LeVeque, 1979)."""
        count, step = self.count + other.count, np.subtract(other.mean, self.mean)
        mean = np.add(self.mean, step * (other.count / count))
        squares = np.add(self.squares, other.squares) + step**2 * (self.count * other.count / count)
        return ChannelSums(count, tuple(mean.tolist()), tuple(squares.tolist()))

    def std(self):
        """Standard deviations, (C,)."""
        return np.sqrt(np.divide(self.squares, self.count))


def normalizing(spec, sums):
    """LatentSpec whose scale and shift give each channel mean 0 and std 1; sums: per batch. Raises InputError."""
    total = functools.reduce(ChannelSums.__add__, sums)
    std = total.std()
    if not (std > 0).all():
        raise InputError(f"--normalize: channel {std.argmin()} of the latents is constant; use the VAE's own scale")
    scale, shift = ([float(f"{value:.{DIGITS}g}") for value in values] for values in (1 / std, total.mean))
    return dataclasses.replace(spec, scale=tuple(scale), shift=tuple(shift))
