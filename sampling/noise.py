"""The noise of sampling, drawn ahead."""

import itertools

from common.look_ahead import ordered_map
from samplers import sample_noise


def batch_noise(seed, batches, draws, shape, device):
    """Yield noise (N, *shape), float32 on the device, in the order of use: all draws of a batch, then the next batch's.

    batches: image indices of each; draws: 1 for the starting noise, and 1 for each step that adds noise. The next one
    is drawn in a thread while the network works.
    """

    def draw(which):
        indices, number = which
        noise = sample_noise(seed, indices, number, shape)
        return noise.pin_memory() if device.type == "cuda" else noise

    for noise in ordered_map(draw, itertools.product(batches, range(draws))):
        yield noise.to(device, non_blocking=True)
