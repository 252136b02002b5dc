"""The training objective: deep supervision, time gaps, acceleration (equations 5, 7 and 10) and SSL alignment.

Letters: N batch, C latent channels, H = W latent size, k branches. Losses are fp32 whatever the autocast: the
networks' outputs are cast here.
"""

import dataclasses
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from models.errors import InputError

WEIGHTINGS = ("uniform", "lognormal")


def sample_times(rng, n, num_branches, weighting, path, tg_upper_bound):
    """Draw the k times of n samples (equation 7), float32 (k, N) in [0, 1].

    t_1 is uniform, or such that log σ/α is a standard normal (on the linear path the logistic of one);
    t_{i+1} = clamp(t_i ± u, 0, 1) with u ~ U(0, tg_upper_bound) and one sign for the whole batch. rng: numpy Generator.
    """
    if weighting == "uniform":
        t = rng.random(n)
    elif weighting == "lognormal":
        t = path.time_of_ratio(np.exp(rng.standard_normal(n)))
    else:
        raise InputError(f"--weighting {weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}")
    sign = 1 if rng.random() < 0.5 else -1
    times = [t]
    for _ in range(num_branches - 1):
        times.append(np.clip(times[-1] + sign * rng.random(n) * tg_upper_bound, 0, 1))
    return torch.from_numpy(np.stack(times).astype(np.float32))


def mean_square(error):
    """(N, C, H, W) → (N,), mean over C, H, W."""
    return error.square().flatten(1).mean(dim=1)


@dataclasses.dataclass
class DeepFlowLoss:
    """Unweighted parts per branch and sample, and their weighted sums per sample."""

    velocity: torch.Tensor  # (k, N), mean((v_i − V)²)
    acceleration: torch.Tensor  # (k − 1, N), mean((x_{ti} − v_i·t_i + ½·a_i·t_i² − x_0)²)
    deep: torch.Tensor  # (N,), Σ_i β_i · velocity_i
    total: torch.Tensor  # (N,), deep + λ · Σ_i acceleration_i

    def parts(self):
        """Batch means by name, for the log."""
        named = {f"loss_v{i}": row for i, row in enumerate(self.velocity, 1)}
        named.update({f"loss_a{i}": row for i, row in enumerate(self.acceleration, 1)})
        return {name: row.detach().mean() for name, row in named.items()}


def deepflow_loss(out, x0, noise, times, path, branch_weights, acc_coeff):
    """Deep supervision with acceleration.

    out: DeepFlowOutput at x_{t1}; x0, noise (N, C, H, W) fp32; times (k, N); branch_weights β: k floats; acc_coeff λ.
    """
    target = path.velocity(x0, noise, times[0])
    velocities = [v.float() for v in out.velocities]
    velocity = torch.stack([mean_square(v - target) for v in velocities])  # equation 5
    if len(branch_weights) != len(velocity):
        raise ValueError(f"{len(branch_weights)} branch weights for {len(velocity)} branches")
    deep = sum(weight * row for weight, row in zip(branch_weights, velocity, strict=True))
    refinements = [
        mean_square(extrapolate(path.interpolate(x0, noise, t), v.detach(), a.float(), t) - x0)
        for v, a, t in zip(velocities[:-1], out.accelerations, times[:-1], strict=True)
    ]
    acceleration = torch.stack(refinements) if refinements else velocity[:0]
    return DeepFlowLoss(velocity, acceleration, deep, deep + acc_coeff * acceleration.sum(dim=0))


def extrapolate(x, v, a, t):
    """Second-order step from time t to the data (equation 10): x + v·(0 − t) + ½·a·(0 − t)²."""
    dt = (0 - t).view(-1, 1, 1, 1)
    return x + v * dt + 0.5 * a * dt**2


def alignment_loss(projections, features):
    """Minus the cosine similarity of matching tokens, averaged over tokens and batch (REPA): (m·E,), one per pair.

    projections: m·E tensors (N, T, Z), of m places of the network, encoder by encoder; features: E tensors (N, T, Z).
    """
    if not features or len(projections) % len(features):
        raise ValueError(f"{len(projections)} projections do not fit {len(features)} encoders")
    pairs = zip(projections, itertools.cycle(features), strict=False)
    return torch.stack([-F.cosine_similarity(p.float(), f.float(), dim=-1).mean() for p, f in pairs])
