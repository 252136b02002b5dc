"""All random numbers of a training step, for the whole global batch, as a pure function of (seed, step).

Every rank and micro-batch takes its rows, so that a step is the same whatever the number of processes.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from loss import sample_times
from models.paths import PATHS

STREAM = 1  # apart from the data order, which draws from stream 0 of the same seed


@dataclasses.dataclass
class StepDraws:
    """Letters: k branches, N samples, C latent channels, h = w latent size."""

    times: torch.Tensor  # (k, N) in [0, 1]
    drop: torch.Tensor  # (N,) bool, labels to replace by the null class
    posterior: torch.Tensor  # (N, C, h, w) standard normal, samples the VAE posterior
    noise: torch.Tensor  # (N, C, h, w) standard normal, ε

    def rows(self, rows, device):
        """The given rows on the given device; a GPU's copy runs beside what follows, as it comes from pinned memory."""
        pinned = torch.device(device).type == "cuda"

        def pick(tensor, dim=0):
            chosen = tensor.index_select(dim, rows)
            return (chosen.pin_memory() if pinned else chosen).to(device, non_blocking=True)

        return StepDraws(pick(self.times, dim=1), pick(self.drop), pick(self.posterior), pick(self.noise))

    def part(self, rows):
        """The given slice of the rows."""
        return StepDraws(self.times[:, rows], self.drop[rows], self.posterior[rows], self.noise[rows])


def draw_step(step, config, num_branches, latent_shape):
    """Draws of one step; latent_shape (C, h, w)."""
    rng = np.random.default_rng([config.seed, step, STREAM])
    n = config.batch_size
    times = sample_times(rng, n, num_branches, config.weighting, PATHS[config.path_type], config.tg_upper_bound)
    drop = torch.from_numpy(rng.random(n) < config.cfg_prob)
    posterior, noise = (torch.from_numpy(rng.standard_normal((n, *latent_shape), dtype=np.float32)) for _ in range(2))
    return StepDraws(times, drop, posterior, noise)


class DrawAhead:
    """Draws of consecutive steps; those of the next step are made in a thread while the device works."""

    def __init__(self, draw):
        self.draw, self.pool, self.ahead = draw, ThreadPoolExecutor(1), {}

    def __call__(self, step):
        current = self.ahead.pop(step, None) or self.pool.submit(self.draw, step)
        self.ahead = {step + 1: self.pool.submit(self.draw, step + 1)}
        return current.result()

    def close(self):
        self.pool.shutdown(wait=True, cancel_futures=True)
