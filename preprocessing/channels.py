"""Mean and std of each channel of latents, added up batch by batch."""

import dataclasses
import functools

import numpy as np

from common.errors import InputError
from common.records import Finite, Whole

DIGITS = 6  # of the scale and shift that are written


@dataclasses.dataclass(frozen=True)
class ChannelSums:
    """Of each channel of latents drawn from moments: number of values, mean, and squared distances from it, added."""

    count: Whole
    mean: tuple[Finite, ...]
    squares: tuple[Finite, ...]

    @classmethod
    def of(cls, moments):
        """Of moments (N, 2C, h, w): a draw's squared distance is the mean's from the overall one, plus std²."""
        mean, std = np.split(np.asarray(moments, np.float64), 2, axis=1)
        middle = mean.mean(axis=(0, 2, 3), keepdims=True)
        squares = ((mean - middle) ** 2 + std**2).sum(axis=(0, 2, 3))
        return cls(mean[:, 0].size, tuple(middle.flatten().tolist()), tuple(squares.tolist()))

    def __add__(self, other):
        """Of both together; subtracts no large numbers (Chan, Golub and LeVeque, 1979)."""
        count, step = self.count + other.count, np.subtract(other.mean, self.mean)
        mean = np.add(self.mean, step * (other.count / count))
        squares = np.add(self.squares, other.squares) + step**2 * (self.count * other.count / count)
        return ChannelSums(count, tuple(mean.tolist()), tuple(squares.tolist()))

    def std(self):
        """Standard deviations, (C,)."""
        return np.sqrt(np.divide(self.squares, self.count))


def normalizing(spec, sums):
    """A LatentSpec with the scale and shift that give each channel mean 0, std 1; sums: by batch. Raises InputError."""
    total = functools.reduce(ChannelSums.__add__, sums)
    std = total.std()
    if not (std > 0).all():
        raise InputError(f"--normalize: channel {std.argmin()} of the latents is constant; use the VAE's own scale")
    scale, shift = ([float(f"{value:.{DIGITS}g}") for value in values] for values in (1 / std, total.mean))
    return dataclasses.replace(spec, scale=tuple(scale), shift=tuple(shift))
