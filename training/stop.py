"""Stopping a run by SIGTERM or SIGUSR1: every process ends after the same step, with a checkpoint behind it."""

import signal

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STOPPED = 75  # sysexits.h, EX_TEMPFAIL: not finished; the same command with --resume auto continues
EXIT_CODES = (
    "On SIGTERM and SIGUSR1 the step is finished, a checkpoint is written and the exit code\n"
    f"is {EXIT_STOPPED}: the same command with --resume auto continues. 0: the run is complete;\n"
    "2: a mistake, named by a line 'error: ...'."
)


class StopRequest:
    """Within this context SIGTERM and SIGUSR1 are noted instead of ending the process.

    Several processes add up what they noted on the CPU while the next step runs, and read the sum one step later: all
    of them stop after the same step, and none waits for its device.
    """

    def __init__(self, num_processes):
        self.noted = False
        self.group = dist.new_group(backend="gloo") if num_processes > 1 else None
        self.exchange = False, None  # sum over the processes, and its handle, of the step before

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number, frame):
        self.noted = True

    def agreed(self):
        """Whether to stop now. Must be called once per step; all processes get the same answer."""
        if self.group is None:
            return self.noted
        before = self._finish_exchange()
        flag = torch.tensor([self.noted], dtype=torch.int64)
        self.exchange = flag, dist.all_reduce(flag, group=self.group, async_op=True)
        return before

    def _finish_exchange(self):
        flag, handle = self.exchange
        if handle is not None:
            handle.wait()
        return bool(flag)

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self._finish_exchange()
