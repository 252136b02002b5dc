"""Starting a run on one or many processes: precision, attention kernels, preflight."""

import importlib.util
import platform
import sys
import threading

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, ProjectConfiguration

from common.errors import InputError
from common.precision import set_math
from common.processes import device_of_process

PREFLIGHT_SECONDS = 60


def start_accelerator(config, run_dir):
    """Accelerator of a resolved configuration. Raises InputError for too few GPUs, or processes that do not connect.

    Precision and accumulation are passed, so that no configuration of accelerate changes them.
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise InputError(f"--report-to {config.report_to} needs a package: pip install {config.report_to}")
    set_math(config.allow_tf32, config.fused_attn)
    accelerator = Accelerator(
        cpu=device_of_process().type == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(run_dir), logging_dir=str(run_dir / config.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    preflight(accelerator)
    return accelerator


def preflight(accelerator):
    """Say who takes part, and fail early and readably when the processes cannot talk to each other."""
    rank, world = accelerator.process_index, accelerator.num_processes
    who = f"rank {rank} of {world} on {platform.node()}, {accelerator.device}"
    sys.stdout.write(who + "\n")
    sys.stdout.flush()
    if world == 1:
        return
    answer = [f"nothing within {PREFLIGHT_SECONDS} s"]

    def add_up():
        try:
            answer[0] = accelerator.reduce(torch.ones(1, device=accelerator.device), reduction="sum").item()
        except RuntimeError as error:
            answer[0] = str(error).splitlines()[0]

    thread = threading.Thread(target=add_up, daemon=True)  # a collective itself may wait for many minutes
    thread.start()
    thread.join(PREFLIGHT_SECONDS)
    if answer[0] != world:
        raise InputError(
            f"preflight: {who} asked for the sum of {world} ones and got: {answer[0]}; check that all processes "
            "started and that the nodes reach each other (main address and port, firewall, NCCL_SOCKET_IFNAME)"
        )


def rows_of_rank(batch_size, world, accumulation, rank):
    """This rank's positions in the global batch, micro-batch after micro-batch. Raises InputError when uneven.

    Micro-batch m of all ranks together is the m-th consecutive part of the batch.
    """
    if batch_size % (world * accumulation):
        raise InputError(
            f"--batch-size {batch_size} is not divisible by {world} processes x --gradient-accumulation-steps "
            f"{accumulation}; it is the global batch, choose a multiple of {world * accumulation}"
        )
    return torch.arange(batch_size).view(accumulation, world, -1)[:, rank].flatten()
