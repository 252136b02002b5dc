"""Joining a process to a launch: torchrun, accelerate, the Slurm recipe, or plain python."""

import contextlib
import dataclasses
import datetime
import json
import os
import time

import torch
import torch.distributed as dist

from common.errors import TURN, InputError

A_WEEK = datetime.timedelta(days=7)  # resumed work may leave one process much more to do than another


@dataclasses.dataclass
class Processes:
    """This process among those of a launch, which sets RANK, WORLD_SIZE and LOCAL_RANK, or alone."""

    rank: int
    world: int
    device: torch.device
    store: object  # torch.distributed's key-value store

    @classmethod
    def join(cls, device=None):
        """Join the launch: NCCL on GPUs, Gloo on CPUs. device: "cuda" or "cpu" instead of the machine's.

        Raises InputError if the processes of a machine outnumber its GPUs.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = device_of_process(device)
        if world == 1:
            return cls(rank, world, device, dist.HashStore())
        store, rank, world = next(dist.rendezvous("env://", timeout=A_WEEK))
        store = dist.PrefixStore("processes", store)
        store.set_timeout(A_WEEK)
        backend, group = "nccl" if device.type == "cuda" else "gloo", dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=A_WEEK)
        return cls(rank, world, device, store)

    @classmethod
    def alone(cls):
        """This process alone, whatever the launch."""
        return cls(0, 1, device_of_process(), dist.HashStore())

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if self.world == 1:
            return
        with contextlib.suppress(Exception):  # the process that hosts the store may be gone
            self.count("left" if error is None else "failed", 1)
            while error is None and self.is_main and self.count("left") + self.count("failed") < self.world:
                time.sleep(0.1)  # this process may host the store, and others may still read it
        if error is None:  # NCCL's end waits for all processes: an error would never be shown
            dist.destroy_process_group()

    def check_others(self):
        """Raise InputError if another process has failed: no launcher ends this one if that was on another machine."""
        if self.count("failed"):
            time.sleep(2 * TURN)  # a launcher on this machine ends this process once the other has said why
            raise InputError("another process failed; fix what its message says, then run the same again")

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        """Wait for all processes, for days if need be."""
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def share(self, key, value=None):
        """The value, JSON-like, that the first process has; the others wait for it. A key serves once."""
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))

    def count(self, key, amount=0):
        """Add to a counter of all processes; returns its sum so far."""
        return self.store.add(key, amount)

    def gather_rows(self, rows):
        """The rows (N, …) of all processes one after the other, on the CPU of every process; N may differ."""
        parts = [rows.cpu()] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, parts[self.rank])
        return torch.cat(parts)


def device_of_process(device=None):
    """This process's device, its own GPU if there are GPUs. Raises InputError if there are too few."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        try:
            return torch.device(kind)
        except RuntimeError:
            raise InputError(f"--device {kind} is unknown; pass cuda or cpu") from None
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        remedy = f"start at most {count}" if count else "use the CPU"
        raise InputError(f"process {local + 1} of this machine has no GPU ({count} visible); {remedy}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
