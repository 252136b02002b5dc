"""Starting a run on one or many processes: precision, attention kernels, preflight."""

import datetime
import os
import platform
import threading

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from common.errors import InputError, first_line
from common.precision import set_math
from common.processes import device_of_process

PREFLIGHT_SECONDS = 60
STALL = datetime.timedelta(hours=1)  # how long processes wait for one that a file system stalls
WRAPPERS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # wrappers of accelerate that split the model


def start_accelerator(config):
    """Accelerator of a resolved configuration. Raises InputError for too few GPUs, or processes that do not connect.

    Precision, accumulation and compilation are passed, so that accelerate's configuration cannot change them.
    """
    for name in (f"ACCELERATE_USE_{wrapper}" for wrapper in WRAPPERS):
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise InputError(f"accelerate is configured to split the model ({name}); launch with --multi_gpu instead")
    set_math(config.allow_tf32, config.fused_attn)
    accelerator = Accelerator(
        cpu=device_of_process().type == "cpu",
        mixed_precision="no" if config.dry_run else config.mixed_precision,  # fp16 needs a GPU
        dynamo_backend="no",  # --compile compiles
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        kwargs_handlers=[
            # few large reductions, overlapping with the backward pass
            DistributedDataParallelKwargs(bucket_cap_mb=250, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=STALL),
        ],
    )
    preflight(accelerator)
    return accelerator


def preflight(accelerator):
    """Say which processes take part, and fail early and readably when they cannot talk to each other."""
    if (world := accelerator.num_processes) == 1:
        return
    who = f"rank {accelerator.process_index} of {world} on {platform.node()}, {accelerator.device}"
    print(f"{who}\n", end="", flush=True)  # one write: the processes share a terminal
    answer = [f"nothing within {PREFLIGHT_SECONDS} s"]

    def add_up():
        try:
            answer[0] = accelerator.reduce(torch.ones(1, device=accelerator.device), reduction="sum").item()
        except RuntimeError as error:
            answer[0] = first_line(error)

    thread = threading.Thread(target=add_up, daemon=True)  # a collective itself may wait for many minutes
    thread.start()
    thread.join(PREFLIGHT_SECONDS)
    if answer[0] != world:
        fault = f"preflight: {who} asked for the sum of {world} ones and got: {answer[0]}"
        remedy = "check that all processes started and reach each other (address, port, firewall, NCCL_SOCKET_IFNAME)"
        raise InputError(f"{fault}; {remedy}")


def rows_of_rank(batch_size, world, accumulation, rank):
    """This rank's positions in the global batch, micro-batch after micro-batch. Raises InputError when uneven.

    Micro-batch m of all ranks together is the m-th consecutive part of the batch.
    """
    if batch_size % (world * accumulation):
        parts = f"{world} processes x --gradient-accumulation-steps {accumulation}"
        remedy = f"it is the global batch, choose a multiple of {world * accumulation}"
        raise InputError(f"--batch-size {batch_size} is not divisible by {parts}; {remedy}")
    return torch.arange(batch_size).view(accumulation, world, -1)[:, rank].flatten()
