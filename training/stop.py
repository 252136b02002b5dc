"""Stopping a run by SIGTERM, SIGUSR1 or Ctrl-C: all processes end after the same step, with a checkpoint."""

import os
import signal
import time

import torch
import torch.distributed as dist

from common.errors import EXIT_INTERRUPTED
from training.distributed import STALL

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 0.3  # seconds: terminal and launcher may both pass on one Ctrl-C


class StopRequest:
    """Within this context SIGNALS are noted instead of ending the process, except for a second Ctrl-C.

    Several processes add up what they noted on the CPU while the next step runs, and read the sum one step later: all
    of them stop after the same step, and none waits for its device.
    """

    def __init__(self, num_processes):
        self.noted, self.interrupted = False, None
        self.group = dist.new_group(backend="gloo", timeout=STALL) if num_processes > 1 else None
        self.before = torch.futures.Future()  # the previous step's sum over the processes
        self.before.set_result([torch.zeros(1)])

    def __enter__(self):
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def _note(self, number, frame):
        self.noted = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted is not None and now - self.interrupted > ECHO:
                os.write(2, b"interrupted twice; --resume auto continues from the last checkpoint\n")
                os._exit(EXIT_INTERRUPTED)
            self.interrupted = now

    def agreed(self):
        """Whether to stop now. Must be called once per step; all processes get the same answer."""
        if self.group is None:
            return self.noted
        (total,) = self.before.wait()
        self.before = dist.all_reduce(torch.tensor([int(self.noted)]), group=self.group, async_op=True).get_future()
        return bool(total)

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self.before.wait()
