"""The order in which training sees the data, and the loader that gathers batches ahead of the training step."""

import contextlib
import dataclasses
import functools
import sys

import numpy as np
import torch

from common.errors import InputError
from common.look_ahead import ordered_map
from dataset import Batch


@functools.lru_cache(maxsize=2)
def draw_epoch(count, seed, epoch):
    """The order of an epoch's images, int64 (count,), and a fair coin for each of them, bool (count,)."""
    order, coins = (np.random.default_rng([seed, epoch, stream]) for stream in (0, 2))
    return order.permutation(count), coins.random(count) < 0.5


@dataclasses.dataclass
class SeekableSampler:
    """Data order as a function of (seed, epoch, position): can start at any step. Incomplete batches are dropped."""

    count: int
    batch_size: int
    seed: int

    def __post_init__(self):
        self.steps_per_epoch = self.count // self.batch_size
        if not self.steps_per_epoch:
            raise InputError(f"--batch-size {self.batch_size}: the data holds only {self.count} images; take fewer")

    def batch(self, step):
        """Indices of global batch `step` (from 0): int64 (batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return draw_epoch(self.count, self.seed, epoch)[0][start : start + self.batch_size].copy()

    def flips(self, step):
        """Which rows of global batch `step` come from the mirrored set: bool (batch_size,)."""
        return draw_epoch(self.count, self.seed, step // self.steps_per_epoch)[1][self.batch(step)]

    def uniforms(self, step):
        """A number in [0, 1) for each row of global batch `step`, float64 (batch_size,); it chooses captions."""
        return np.random.default_rng([self.seed, step, 3]).random(self.batch_size)


@dataclasses.dataclass
class LatentLoader:
    """Batches of steps start_step … stop_step − 1, gathered in a thread while the steps before them run.

    rows: positions of the global batch that this rank takes, by default all. Errors of the thread are raised in the
    loop; leaving the loop ends the thread.
    """

    dataset: object
    sampler: SeekableSampler
    rows: np.ndarray | None = None
    start_step: int = 0
    stop_step: int = sys.maxsize
    device: torch.device | str = "cpu"

    def __iter__(self):
        device = torch.device(self.device)
        copy = CopyToGPU(device) if device.type == "cuda" else None
        rows = np.arange(self.sampler.batch_size) if self.rows is None else np.asarray(self.rows)

        def gather(step):
            read = functools.partial(self.dataset.gather_step, self.sampler, step, rows)
            return step, copy.start(read) if copy else read()

        with contextlib.closing(ordered_map(gather, range(self.start_step, self.stop_step), ahead=2)) as gathered:
            for step, tensors in gathered:
                moments, condition, images, *features = copy.finish(tensors) if copy else tensors
                yield Batch(step, moments, condition, images, tuple(features))


class CopyToGPU:
    """Copies from page-locked memory, on a stream of their own so that they run beside the training step."""

    def __init__(self, device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self.device)

    def start(self, gather):
        """(copies, event of their end) of gather(pin) → tensors or None, pin: into page-locked memory; in a thread."""
        torch.cuda.set_device(self.device)  # a new thread starts on GPU 0, and pinning would claim memory there
        tensors = gather(True)
        with torch.cuda.stream(self._stream):
            copies = [t if t is None else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return copies, self._stream.record_event()

    def finish(self, started):
        """Tensors on the GPU; what follows on the caller's stream waits for the copies."""
        copies, copied = started
        here = torch.cuda.current_stream(self.device)
        here.wait_event(copied)
        for tensor in copies:
            if tensor is not None:
                tensor.record_stream(here)
        return copies
