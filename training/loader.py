"""TODO docstring."""

import queue
import threading

import numpy as np
import torch

from common.errors import InputError
from dataset import Batch


class SeekableSampler:
    """Data order as a pure function of (seed, epoch, position); any step is found at once.

    The last incomplete batch of an epoch is dropped. World size plays no part: a rank takes its rows of each batch.
    """

    def __init__(self, count, batch_size, seed):
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: at least 1")
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
    """Batches of steps start_step … stop_step − 1, gathered in a background thread while the step before runs.

    rows: positions of the global batch that this rank takes (default: all); stop_step None: no end; depth: batches
    held ready. Errors of the thread are raised at the consumer; leaving the loop ends the thread.
    """

    def __init__(self, dataset, sampler, rows=None, start_step=0, stop_step=None, device="cpu", depth=2):
        self.dataset, self.sampler, self.device = dataset, sampler, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.rows = np.arange(sampler.batch_size) if rows is None else np.asarray(rows)
        self.start_step, self.stop_step, self.depth = start_step, stop_step, depth

    def __iter__(self):
        ready, stop = queue.Queue(self.depth), threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop), name="latent-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._receive(*item)
        finally:
            stop.set()
            while thread.is_alive():
                _take_all(ready)
                thread.join(0.01)

    def _fill(self, ready, stop):
        """Thread: put batches, then None, or the exception that ended it."""
        try:
            stream = None
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread starts on GPU 0, and pinning would claim memory there
                stream = torch.cuda.Stream(self.device)
            step = self.start_step
            while not stop.is_set() and (self.stop_step is None or step < self.stop_step):
                _put(ready, self._gather(step, stream), stop)
                step += 1
            _put(ready, None, stop)
        except BaseException as error:
            _put(ready, error, stop)

    def _gather(self, step, stream):
        tensors = self.dataset.gather_step(self.sampler, step, self.rows, pin=stream is not None)
        if stream is None:
            return step, tensors, None
        with torch.cuda.stream(stream):  # a stream of its own, so that the copy runs beside the training step
            tensors = [None if t is None else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return step, tensors, stream.record_event()

    def _receive(self, step, tensors, copied):
        """Consumer: order the copy before what follows on this stream."""
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(here)
        tensors = [t if t is None or copied is not None else t.to(self.device) for t in tensors]
        return Batch(step, *tensors[:3], tuple(tensors[3:]))


def _put(ready, item, stop):
    while not stop.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


def _take_all(ready):
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
