"""All random numbers of a training step, for the whole global batch, as a pure function of (seed, step).

Every rank and micro-batch takes its rows, so that a step is the same whatever the number of processes.
"""

import dataclasses

import numpy as np
import torch

from loss import flow_map_times, guided_samples, sample_times
from models.paths import PATHS

STREAM = 1  # the data order draws from stream 0 of the same seed
SAMPLES_SECOND = ("times", "guided")  # draws that have the samples in their second dimension
ON_CPU = ("guided",)  # draws that decide what is run; on the CPU nothing has to wait for them


@dataclasses.dataclass
class StepDraws:
    """Letters: k branches, N samples, C latent channels, h = w latent size."""

    times: torch.Tensor  # (k, N) in [0, 1]
    drop: torch.Tensor  # (N,) bool, labels to replace by the null class
    posterior: torch.Tensor  # (N, C, h, w) standard normal, samples the VAE posterior
    noise: torch.Tensor  # (N, C, h, w) standard normal, ε

    def rows(self, rows, device):
        """The given rows on the given device; pinned memory lets the copy to a GPU run beside what follows."""
        chosen = {name: tensor.index_select(int(name in SAMPLES_SECOND), rows) for name, tensor in vars(self).items()}
        pinned = torch.device(device).type == "cuda"
        for name, tensor in chosen.items():
            if name not in ON_CPU:
                chosen[name] = (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)
        return type(self)(**chosen)

    def part(self, rows):
        """The given slice of the rows."""
        parts = {name: t[:, rows] if name in SAMPLES_SECOND else t[rows] for name, t in vars(self).items()}
        return type(self)(**parts)


@dataclasses.dataclass
class FlowMapDraws(StepDraws):
    """As StepDraws; times (3, N): t of the flow part, then t ≥ r of the mean-flow part, which has its own noise."""

    map_noise: torch.Tensor  # (N, C, h, w) standard normal
    guided: torch.Tensor  # (2, N) bool, samples with guidance in the flow part and in the mean-flow part


def draw_step(step, config, num_branches, latent_shape):
    """Draws of one step; latent_shape (C, h, w)."""
    rng = np.random.default_rng([config.seed, step, STREAM])
    n = config.batch_size
    times = sample_times(rng, n, num_branches, config.weighting, PATHS[config.path_type], config.tg_upper_bound)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    posterior, noise = (torch.from_numpy(rng.standard_normal((n, *latent_shape), dtype=np.float32)) for _ in range(2))
    return StepDraws(times, drop, posterior, noise)


def draw_flow_map_step(step, config, latent_shape):
    """Draws of one step of a flow map's training; latent_shape (C, h, w)."""
    rng = np.random.default_rng([config.seed, step, STREAM])
    n = config.batch_size
    normals = torch.from_numpy(rng.standard_normal((3, n), dtype=np.float32))
    means, stds = (config.P_mean, config.P_mean_t, config.P_mean_r), (config.P_std, config.P_std_t, config.P_std_r)
    times = flow_map_times(normals, means, stds)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    latents = (torch.from_numpy(rng.standard_normal((n, *latent_shape), dtype=np.float32)) for _ in range(3))
    guided = guided_samples(config.g_type, times, drop, config.g_min, config.g_max)
    return FlowMapDraws(times, drop, *latents, guided)
