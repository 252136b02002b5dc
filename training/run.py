"""The course of a run, from its flags to its end, the same for every train*.py; a Task says what is trained."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import InputError
from dataset import DataInfo, open_dataset
from models import create_model
from models.codec import LatentCodec, LatentSpec
from models.flops import count_flops
from models.presets import IMAGENET
from training.alignment import describe_alignment, find_caches
from training.checkpoint import find_resume
from training.config import RunFlags
from training.distributed import rows_of_rank, start_accelerator
from training.loader import SeekableSampler
from training.stop import EXIT_STOPPED
from training.trainer import Trainer


@dataclasses.dataclass
class Task:
    """What a program trains, as functions of its flags and, once it is set up, of the Run."""

    open_data: Callable  # (config) → DataInfo and dataset, which is None in a dry run without data
    start: Callable  # (config, info, resumed checkpoint or None) → constructor arguments, function that makes the model
    objective: Callable  # (run) → function (network, batch, draws) → loss and {name: 0-d tensor} for the log
    draw: Callable  # (run) → function (step) → the random draws of the whole global batch
    flops_per_image: Callable  # (run) → FLOP of a training step for one image
    grids: type  # draws the sample grids: grids(codec, dataset, run_dir, seed)


@dataclasses.dataclass
class Run:
    """A run that is set up."""

    config: RunFlags
    accelerator: object
    info: DataInfo
    dataset: object
    options: dict  # constructor arguments of the model
    model: torch.nn.Module
    weights: list  # β of each branch
    rows: torch.Tensor  # this rank's rows of the global batch

    @property
    def latent_shape(self):
        """(C, h, w)."""
        return (self.info.spec.channels, *self.info.moments_shape[1:])

    def saved(self):
        """What checkpoints and config.json record, JSON-like: flags, model, and data (classes, VAE, shapes)."""
        data = dataclasses.asdict(self.info)
        spec = data.pop("spec")
        data["moments_shape"] = list(data["moments_shape"])
        data["class_names"] = list(data["class_names"]) if data["class_names"] else None
        config = {**dataclasses.asdict(self.config), "model_options": self.options}
        return {"config": config, "data": {**data, **spec}}


def run_task(config, task):
    """Train a Task as the flags say; a dry run only describes it. Raises InputError; may exit with EXIT_STOPPED."""
    config = config.resolve()
    config.check()
    info, dataset = task.open_data(config)
    check_resolution(config, info)
    resumed = None if config.dry_run else find_resume(config.folder, config.resume)
    options, make_model = task.start(config, info, resumed)
    weights = config.branch_weights(len(options["df_idxs"]) + 1)
    accelerator = start_accelerator(config, config.folder)
    world, rank = accelerator.num_processes, accelerator.process_index
    rows = rows_of_rank(config.batch_size, world, config.gradient_accumulation_steps, rank)
    accelerator.print(describe(config, options, info, world))
    if config.dry_run:
        return
    grids = open_grids(task, config, dataset, accelerator)
    model = make_model()
    model.gradient_checkpointing = config.gradient_checkpointing
    train(task, Run(config, accelerator, info, dataset, options, model, weights, rows), grids)


def open_grids(task, config, dataset, accelerator):
    """The grid sampler on the main process, where grids are wanted; else None."""
    if not (config.sampling_steps and accelerator.is_main_process):
        return None
    codec = LatentCodec.load(config.vae or dataset.info.spec.vae, device=accelerator.device)
    return task.grids(codec, dataset, config.folder, config.seed)


def train(task, run, grids):
    """All steps of a run. Exits with EXIT_STOPPED where a signal stops it."""
    trainer = Trainer(run, task.objective(run), task.draw(run), task.flops_per_image(run), grids)
    start_trackers(run.accelerator, run.config)
    finished = trainer.fit()
    run.accelerator.end_training()
    if not finished:
        sys.exit(EXIT_STOPPED)


def open_classes(config):
    """The dataset of labelled images and its DataInfo; a dry run may go without one and then assumes ImageNet's."""
    if config.dry_run and not Path(config.data_dir).exists():
        print(f"--data-dir {config.data_dir} does not exist: ImageNet and its usual VAE are assumed", flush=True)
        classes, resolution = config.num_classes or IMAGENET["num_classes"], config.resolution or IMAGENET["resolution"]
        spec = LatentSpec()
        shape = (2 * spec.channels, resolution // spec.factor, resolution // spec.factor)
        return DataInfo(IMAGENET["count"], classes, spec, shape, resolution), None
    caches = find_caches(config)
    dataset = open_dataset(
        config.data_dir,
        images=len(caches) < len(config.encoders()),
        features=tuple(caches),
        mirror=config.mirror,
        num_classes=config.num_classes,
        data_vae=config.data_vae,
        workers=config.num_workers,
    )
    return dataset.info, dataset


def check_resolution(config, info):
    """Raise InputError where --resolution contradicts the data."""
    if config.resolution not in (None, info.resolution):
        raise InputError(
            f"--resolution {config.resolution} contradicts --data-dir {config.data_dir}, which holds latents of "
            f"{info.resolution}x{info.resolution} images"
        )


def describe(config, options, info, world):
    """The resolved run in text: configuration, model size, samples per step, steps and epochs."""
    with torch.device("meta"):
        model = create_model(config.model, **options)
    flops = count_flops(model)
    sampler = SeekableSampler(info.count, config.batch_size, config.seed)
    steps = min(config.max_train_steps, config.epochs * sampler.steps_per_epoch)
    lines = [
        f"run: {config.to_json()}",
        f"model: {config.model} {options}",
        f"parameters: {sum(p.numel() for p in model.parameters()):,}",
        f"forward pass of one sample: {2 * flops.total_macs / 1e9:.2f} GFLOP "
        f"({flops.paper_macs / 1e9:.2f} G multiply-adds as the paper counts them)",
        f"data: {info}",
        f"{config.batch_size} samples per step, {sampler.steps_per_epoch:,} steps per epoch, {steps:,} steps = "
        f"{steps / sampler.steps_per_epoch:.1f} epochs, {world} processes, "
        f"{config.gradient_accumulation_steps} micro-batches, mixed precision {config.mixed_precision}",
        *describe_alignment(config),
    ]
    if steps * (1 - config.ema_decay) < 5:
        lines.append(f"warning: --ema-decay {config.ema_decay} averages over more than the run's {steps} steps")
    if steps < config.max_train_steps:
        lines.append(f"note: --epochs {config.epochs} ends the run before --max-train-steps {config.max_train_steps}")
    return "\n".join(lines)


def start_trackers(accelerator, config):
    """Tell the tracker of --report-to the run's flags; a resumed run continues under its own name."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, int | float | str)}
    wandb = {"name": config.exp_name, "id": config.exp_name, "resume": "allow"}
    accelerator.init_trackers("deepflow", config=flags, init_kwargs={"wandb": wandb})
