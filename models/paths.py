"""Probability paths x_t = α_t·x_0 + σ_t·ε between data (t = 0) and noise (t = 1), for losses and samplers alike."""

import math

import numpy as np
import torch


class Path:
    """A path x_t between data and noise; subclasses give α, σ and their derivatives at times t in [0, 1].

    Their time_of_ratio gives the time at which σ/α is `ratio`, a numpy array in (0, ∞).
    """

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


class LinearPath(Path):
    """α = 1 − t, σ = t: the paper's path; its velocity is ε − x_0."""

    name = "linear"

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def d_alpha(self, t):
        return -torch.ones_like(t)

    def d_sigma(self, t):
        return torch.ones_like(t)

    def time_of_ratio(self, ratio):
        return ratio / (1 + ratio)


class CosinePath(Path):
    """α = cos(πt/2), σ = sin(πt/2), with the derivatives that the release leaves out."""

    name = "cosine"

    def alpha(self, t):
        return torch.cos(t * math.pi / 2)

    def sigma(self, t):
        return torch.sin(t * math.pi / 2)

    def d_alpha(self, t):
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def d_sigma(self, t):
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def time_of_ratio(self, ratio):
        return 2 / math.pi * np.arctan(ratio)


PATHS = {path.name: path for path in (LinearPath(), CosinePath())}
