"""Starting a run on one or many processes: precision, attention kernels, preflight."""

import contextlib
import datetime
import os
import platform
import threading

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from common.errors import TURN, InputError, first_line, report
from common.precision import set_math
from common.processes import device_of_process

PREFLIGHT_SECONDS = 300  # some processes import torch from a busy disk, or wait for their GPU
REACH = (
    "check that all processes started and can reach each other "
    "(address, port, firewall, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
)
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
    with connecting():
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


@contextlib.contextmanager
def connecting():
    """End the process with an error after PREFLIGHT_SECONDS: the block waits for all processes, started or not."""

    def give_up():
        if os.environ.get("RANK") != "0":
            timer.finished.wait(TURN)
        if not timer.finished.is_set():
            report(f"error: preflight: {name_of_process()} did not reach all others in {PREFLIGHT_SECONDS} s; {REACH}")
            os._exit(2)

    timer = threading.Timer(PREFLIGHT_SECONDS, give_up)
    timer.daemon = True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def name_of_process():
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on {platform.node()}"


def preflight(accelerator):
    """Say which processes take part, and fail early and readably when they cannot talk to each other."""
    if (world := accelerator.num_processes) == 1:
        return
    print(f"{name_of_process()}, {accelerator.device}\n", end="", flush=True)  # one write: they share a terminal
    ones = torch.ones(1)
    try:
        answer = accelerator.reduce(ones.to(accelerator.device), reduction="sum").item()
        dist.all_reduce(ones, group=dist.new_group(backend="gloo"))  # which carries stop signals and lost processes
    except RuntimeError as error:
        answer = first_line(error)
    if not answer == ones.item() == world:
        fault = f"{name_of_process()} summed a one from each of {world} processes and got: {answer}"
        raise InputError(f"preflight: {fault}; {REACH}")


def rows_of_rank(batch_size, world, accumulation, rank):
    """This rank's positions in the global batch, micro-batch after micro-batch. Raises InputError when uneven.

    Micro-batch m of all ranks together is the m-th consecutive part of the batch.
    """
    if batch_size % (world * accumulation):
        parts = f"{world} processes x --gradient-accumulation-steps {accumulation}"
        remedy = f"it is the global batch, choose a multiple of {world * accumulation}"
        raise InputError(f"--batch-size {batch_size} is not divisible by {parts}; {remedy}")
    return torch.arange(batch_size).view(accumulation, world, -1)[:, rank].flatten()
