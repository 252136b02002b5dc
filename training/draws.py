"""The random numbers of a training step, a pure function of (seed, step) and the row in the global batch.

So a step is the same for any number of processes. Small draws are made for the whole batch. Gaussian noise in the shape
of latents has a generator for each block of rows, and a rank draws only the blocks that hold its rows.
"""

import dataclasses

import numpy as np
import torch

from loss import flow_map_times, guided_samples, sample_times
from models.paths import PATHS

STREAM, NORMALS, HELD_OUT = 1, 4, 5  # the data order draws from streams 0, 2 and 3 of the same seed
BLOCK = 16  # rows: few, as a rank draws whole blocks; enough that making a generator takes only 2 % of the time
SAMPLES_SECOND = ("times", "guided")  # draws that have the samples in their second dimension
ON_CPU = ("guided",)  # draws that decide what is run; on the CPU nothing has to wait for them


@dataclasses.dataclass
class StepDraws:
    """Letters: k branches, N samples, C latent channels, h = w latent size."""

    times: torch.Tensor  # (k, N) in [0, 1]
    drop: torch.Tensor  # (N,) bool, labels to replace by the null class
    posterior: torch.Tensor  # (N, C, h, w) standard normal, samples the VAE posterior
    noise: torch.Tensor  # (N, C, h, w) standard normal, ε

    def to(self, device):
        """The draws on the given device; pinned memory makes the copy to a GPU asynchronous."""
        moved, pinned = dict(vars(self)), torch.device(device).type == "cuda"
        for name in moved.keys() - ON_CPU:
            moved[name] = (moved[name].pin_memory() if pinned else moved[name]).to(device, non_blocking=True)
        return type(self)(**moved)

    def part(self, rows):
        """The given slice of the rows."""
        parts = {name: t[:, rows] if name in SAMPLES_SECOND else t[rows] for name, t in vars(self).items()}
        return type(self)(**parts)


@dataclasses.dataclass
class FlowMapDraws(StepDraws):
    """As StepDraws; times (3, N): t of the flow part, then t ≥ r of the mean-flow part, which has its own noise."""

    map_noise: torch.Tensor  # (N, C, h, w) standard normal
    guided: torch.Tensor  # (2, N) bool, samples with guidance in the flow part and in the mean-flow part


def draw_step(step, config, num_branches, latent_shape, rows=slice(None), block=BLOCK):
    """Draws of the rows (int64 positions) of one step's global batch; latent_shape (C, h, w), block as of `normals`."""
    rng = np.random.default_rng([config.seed, step, STREAM])
    n = config.batch_size
    times = sample_times(rng, n, num_branches, config.weighting, PATHS[config.path_type], config.tg_upper_bound)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    return StepDraws(times[:, rows], drop[rows], *normals(2, latent_shape, step, config, rows, block, rng))


def draw_flow_map_step(step, config, latent_shape, rows=slice(None), block=BLOCK):
    """Like draw_step, for the training of a flow map."""
    rng = np.random.default_rng([config.seed, step, STREAM])
    n = config.batch_size
    logits = torch.from_numpy(rng.standard_normal((3, n), dtype=np.float32))
    means, stds = (config.P_mean, config.P_mean_t, config.P_mean_r), (config.P_std, config.P_std_t, config.P_std_r)
    times = flow_map_times(logits, means, stds)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    guided = guided_samples(config.g_type, times, drop, config.g_min, config.g_max)
    latents = normals(3, latent_shape, step, config, rows, block, rng)
    return FlowMapDraws(times[:, rows], drop[rows], *latents, guided[:, rows])


def normals(count, shape, step, config, rows, block, rng):
    """`count` draws of standard normals for the given rows, float32 (count, len(rows), *shape).

    block: rows per generator; 0: all rows come from `rng`, as in runs that began before blocks existed.
    """
    rows, size = torch.arange(config.batch_size)[rows].numpy(), block or config.batch_size
    out = np.empty((count, len(rows), *shape), np.float32)
    for number in np.unique(rows // size):
        generator = np.random.default_rng([config.seed, step, NORMALS, number]) if block else rng
        own = rows // size == number
        out[:, own] = generator.standard_normal((count, size, *shape), dtype=np.float32)[:, rows[own] % size]
    return torch.from_numpy(out)
