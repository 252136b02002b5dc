"""This process among those of torchrun, or alone, with what evaluation needs of torch.distributed."""

import dataclasses
import datetime
import os

import torch
import torch.distributed as dist


@dataclasses.dataclass
class ProcessGroup:
    """Rank and number of the processes, and the device of this one; nccl on GPUs, gloo on CPUs."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if world > 1:  # the first computes distances while the others wait
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=6))
        return cls(rank, world, device)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def gather_rows(self, rows):
        """The rows (N, …) of all processes one after the other, on every process; N may differ."""
        if self.world == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def stop(self):
        if self.world > 1:
            dist.destroy_process_group()
