"""Runs train.py with a fault, for tests: python tests/faulty_train.py FAULT FLAGS-OF-TRAIN.PY

infinite-loss, infinite-gradient: in the second step, on the last process only; slow-write: checkpoints are written in
small pieces with pauses; late-rank: the last process takes no part in the preflight; report-exit: no fault, every
process says its exit code; report-exit-after-own-signal: likewise, and the last one sends itself SIGUSR1 in its third
step; interrupt-twice: Ctrl-C in the second step, and again while it goes on; failing-rank, killed-rank: the last
process fails or is killed in the second step, in which the others wait as NCCL does, while a checkpoint is written.
"""

import datetime
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import torch

import train
import training.checkpoint
import training.distributed
import training.stop
import training.trainer
from common.errors import InputError, exit_on_input_error
from common.flags import parse_flags
from training.config import TrainConfig

LAST = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)


def infinite_loss(loss, network):
    return loss * float("inf")


def infinite_gradient(loss, network):
    """One element of one parameter's gradient, before it is averaged over the processes."""
    parameter = [p for p in network.parameters() if p.requires_grad][-1]
    infinity = torch.zeros_like(parameter)
    infinity.view(-1)[0] = float("inf")
    handle = parameter.register_hook(lambda gradient: handle.remove() or gradient + infinity)
    return loss


def interrupt_twice(loss, network):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * training.stop.ECHO)
    return loss


def fail(loss, network):
    raise InputError("rows-00003.bin is damaged; pack it again")


def kill(loss, network):
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_last(how):
    """how(loss, network) ends the last process; no checkpoint is written before the others have noticed."""
    noticed, write = threading.Event(), training.checkpoint.write_atomically
    finish = training.trainer.Trainer.finish_writing

    def write_later(path, *rest, **options):
        if str(path).endswith(".pt"):
            noticed.wait()
        write(path, *rest, **options)

    def wait_in_c(loss, network):  # where no handler of a signal runs
        torch.distributed.HashStore().wait(["never"], datetime.timedelta(minutes=1))

    training.stop.GRACE, training.checkpoint.write_atomically = 0.1, write_later
    training.trainer.Trainer.finish_writing = lambda trainer: noticed.set() or finish(trainer)
    train.objective = injected(how if LAST else wait_in_c, last_only=False)


def injected(inject, at_call=2, last_only=True, objective=train.objective):
    """train.objective whose `at_call`-th loss goes through inject(loss, network) on the last process, or on all."""
    calls = 0

    def wrapped(network, *args, **kwargs):
        nonlocal calls
        calls += 1
        loss, parts = objective(network, *args, **kwargs)
        return (inject(loss, network) if calls == at_call and (LAST or not last_only) else loss), parts

    return wrapped


class SlowFile:
    """Writes in pieces of 256 KiB with a pause after each."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 2**18):
            self.file.write(view[start : start + 2**18])
            self.file.flush()
            time.sleep(0.002)
        return len(view)

    def flush(self):
        self.file.flush()


def slow_write(path, write, original=training.checkpoint.write_atomically, **options):
    original(path, lambda file: write(SlowFile(file) if str(path).endswith(".pt") else file), **options)


def apply(fault):
    if fault == "infinite-loss":
        train.objective = injected(infinite_loss)
    elif fault == "infinite-gradient":
        train.objective = injected(infinite_gradient)
    elif fault == "slow-write":
        training.checkpoint.write_atomically = slow_write
    elif fault == "late-rank":
        training.distributed.PREFLIGHT_SECONDS = 2
        if LAST:
            training.distributed.preflight = lambda accelerator: time.sleep(30)
    elif fault == "report-exit-after-own-signal":
        train.objective = injected(lambda loss, network: os.kill(os.getpid(), signal.SIGUSR1) or loss, at_call=3)
    elif fault == "interrupt-twice":
        train.objective = injected(interrupt_twice)
    elif fault in ("failing-rank", "killed-rank"):
        lose_the_last(fail if fault == "failing-rank" else kill)
    elif fault != "report-exit":
        raise SystemExit(f"unknown fault {fault}")


if __name__ == "__main__":
    apply(sys.argv[1])
    with exit_on_input_error():
        try:
            train.train(parse_flags(TrainConfig, sys.argv[2:]))
        except SystemExit as end:
            print(f"exits with {end.code}\n", end="", flush=True)
            raise
