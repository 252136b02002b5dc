"""Stopping a run by SIGTERM, SIGUSR1 or Ctrl-C: all processes end after the same step, with a checkpoint.

If a process fails or is killed, the others end within seconds.
"""

import contextlib
import datetime
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from common.errors import EXIT_INTERRUPTED
from training.distributed import STALL

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 0.3  # seconds: terminal and launcher may both pass on one Ctrl-C
GRACE = 5  # seconds for the launcher to see which process failed first, and for those not stuck to end by themselves
ALWAYS = datetime.timedelta(days=3650)


class StopRequest:
    """Within this context SIGNALS are noted instead of ending the process, except for a second Ctrl-C.

    Several processes add up what they noted on the CPU while the next step runs, and read the sum one step later: all
    of them stop after the same step, and none waits for its device.

    If a process ends early, the others would wait for it in NCCL, where a launcher's signal is at most noted. So a
    thread of each waits for a message from the next process; the connection breaks when that process is gone.
    """

    def __init__(self, num_processes, finish=lambda: None):
        """finish: called if another process ends early, to wait for what must be kept, such as a checkpoint."""
        self.noted, self.interrupted, self.finish, self.failed = False, None, finish, False
        self.group = dist.new_group(backend="gloo", timeout=STALL) if num_processes > 1 else None
        self.before = torch.futures.Future()  # the previous step's sum over the processes
        self.before.set_result([torch.zeros(1)])

    def __enter__(self):
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._note) for number in heeded}
        if self.group is not None:
            rank, world = dist.get_rank(), dist.get_world_size()
            self.previous, self.next = (rank - 1) % world, (rank + 1) % world
            self.watch = threading.Thread(target=self._watch, daemon=True)
            self.watch.start()
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
        self.failed = kind is not None
        if self.group is not None and not self.failed:
            self.before.wait()
            dist.send(torch.ones(1), self.previous, self.group)
            self.watch.join()

    def _watch(self):
        """Return once the next process leaves the context; if one ended early, pass that on and end this one too."""
        fine, told = torch.zeros(1), False
        with contextlib.suppress(RuntimeError):  # a broken connection
            dist.irecv(fine, self.next, self.group).wait(ALWAYS)
            told = True
        if fine:
            return
        with contextlib.suppress(RuntimeError):
            dist.send(fine, self.previous, self.group)
        with contextlib.suppress(Exception):  # only the other process's end is worth reporting
            self.finish()
        time.sleep(GRACE)
        if not self.failed:  # else it ends with its own error
            if not told:  # only the process that noticed prints it
                os.write(2, b"another process of the run ended early, so this one ends too; use --resume auto\n")
            os._exit(1)
