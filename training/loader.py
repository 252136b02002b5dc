"""The order in which training sees the data, and the loader that gathers batches ahead of the training step."""

import contextlib
import itertools

import numpy as np
import torch

from common.errors import InputError
from common.look_ahead import ordered_map
from dataset import Batch


class SeekableSampler:
    """Data order as a pure function of (seed, epoch, position); any step is found at once.

    The last incomplete batch of an epoch is dropped. World size plays no part: a rank takes its rows of each batch.
    """

    def __init__(self, count, batch_size, seed):
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: must be at least 1")
        if count < batch_size:
            raise InputError(f"--batch-size {batch_size}: the data holds only {count} images; take {count} or fewer")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        self._order, self._coins = (None, None), (None, None)  # of the last epoch asked for

    def batch(self, step):
        """Indices of global batch `step` (from 0): int64 (batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        known, order = self._order  # one read: the loader's thread may be in another epoch
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(self.count).astype(np.int64, copy=False)
            self._order = (epoch, order)
        return order[position * self.batch_size : (position + 1) * self.batch_size].copy()

    def flips(self, step):
        """Which rows of global batch `step` come from the mirrored set: bool (batch_size,), one fair coin per image."""
        epoch = step // self.steps_per_epoch
        known, coins = self._coins
        if known != epoch:
            coins = np.random.default_rng([self.seed, epoch, 2]).random(self.count) < 0.5
            self._coins = (epoch, coins)
        return coins[self.batch(step)]

    def uniforms(self, step):
        """A number in [0, 1) for each row of global batch `step`, float64 (batch_size,); it chooses captions."""
        return np.random.default_rng([self.seed, step, 3]).random(self.batch_size)


class LatentLoader:
    """Batches of steps start_step … stop_step − 1, gathered in a thread while the steps before them run.

    rows: positions of the global batch that this rank takes (default: all); stop_step None: no end; depth: batches
    gathered ahead. Errors of the thread are raised in the loop; leaving the loop ends the thread.
    """

    def __init__(self, dataset, sampler, rows=None, start_step=0, stop_step=None, device="cpu", depth=2):
        self.dataset, self.sampler, self.device = dataset, sampler, torch.device(device)
        self.rows = np.arange(sampler.batch_size) if rows is None else np.asarray(rows)
        self.start_step, self.stop_step, self.depth = start_step, stop_step, depth

    def __iter__(self):
        copy = CopyToGPU(self.device) if self.device.type == "cuda" else Copy(self.device)
        endless = self.stop_step is None
        steps = itertools.count(self.start_step) if endless else range(self.start_step, self.stop_step)

        def gather(step):
            return step, copy.start(lambda pin: self.dataset.gather_step(self.sampler, step, self.rows, pin))

        with contextlib.closing(ordered_map(gather, steps, ahead=self.depth)) as gathered:
            for step, copies in gathered:
                moments, condition, images, *features = copy.finish(copies)
                yield Batch(step, moments, condition, images, tuple(features))


class Copy:
    """Gathers tensors (None stays None) in a thread and hands them over on a device, in the training loop."""

    def __init__(self, device):
        self.device = device

    def start(self, gather):
        """What `finish` takes; gather(pin) → tensors, pin: into page-locked memory."""
        return gather(False)

    def finish(self, tensors):
        """Tensors on the device."""
        return [t if t is None else t.to(self.device) for t in tensors]


class CopyToGPU(Copy):
    """Copies from page-locked memory, on a stream of their own so that they run beside the training step."""

    def __init__(self, device):
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self.device)

    def start(self, gather):
        """(copies, event of their end)."""
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
