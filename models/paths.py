"""Probability paths x_t = α_t·x_0 + σ_t·ε between data (t = 0) and noise (t = 1), for losses and samplers alike."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Path:
    """A path x_t between data and noise: α, σ and their derivatives at times t in [0, 1], tensors."""

    name: str
    alpha: Callable
    sigma: Callable
    d_alpha: Callable
    d_sigma: Callable
    time_of_ratio: Callable  # the time at which σ/α is `ratio`, a numpy array in (0, ∞)

    def interpolate(self, x0, noise, t):
        """x_t = α_t·x_0 + σ_t·ε, (N, C, H, W), at times t (N,) (equation 1)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def velocity(self, x0, noise, t):
        """The target V = dx_t/dt = α'·x_0 + σ'·ε of flow matching, (N, C, H, W), at times t (N,) (equations 2, 3)."""
        t = t.view(-1, *[1] * (x0.ndim - 1))
        return self.d_alpha(t) * x0 + self.d_sigma(t) * noise

    def score(self, v, x, t):
        """∇ log p_t(x) from the velocity: ((α/α')·v − x) / (σ² − (α/α')·σ'·σ); t a 0-d tensor in (0, 1]."""
        ratio = self.alpha(t) / self.d_alpha(t)
        sigma = self.sigma(t)
        return (ratio * v - x) / (sigma**2 - ratio * self.d_sigma(t) * sigma)


LINEAR = Path(  # the paper's; its velocity is ε − x_0
    "linear",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=torch.ones_like,
    time_of_ratio=lambda ratio: ratio / (1 + ratio),
)
COSINE = Path(  # with the derivatives that the release leaves out
    "cosine",
    alpha=lambda t: torch.cos(t * math.pi / 2),
    sigma=lambda t: torch.sin(t * math.pi / 2),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    d_sigma=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
    time_of_ratio=lambda ratio: 2 / math.pi * np.arctan(ratio),
)
PATHS = {path.name: path for path in (LINEAR, COSINE)}
