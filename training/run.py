"""The course of a run, from its flags to its end, the same for every train*.py; a Task says what is trained."""

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import EXIT_STOPPED, InputError, note, say
from common.files import check_writable
from common.flags import shown, words_of
from dataset import CaptionInfo, DataInfo, open_captions, open_dataset
from models import create_model
from models.checkpoints import checkpoint_path, existing_steps
from models.codec import LatentCodec
from models.compiling import keep_compiled
from models.flops import count_flops
from models.gpus import gpu_hours
from models.presets import COCO, IMAGENET, PRESETS
from models.specs import LatentSpec
from training.alignment import Targets, describe_alignment, find_caches
from training.checkpoint import find_resume
from training.config import RunFlags
from training.distributed import rows_of_rank, start_accelerator
from training.draws import BLOCK
from training.grids import GridSampler
from training.holdout import describe_holdout, hold_out
from training.loader import SeekableSampler
from training.trackers import check_tracker
from training.trainer import Trainer

INITIAL_SHARE = 0.1  # in the averaged weights at the end (decay ** steps); a larger share gives a warning


@dataclasses.dataclass
class Task:
    """What a program trains, as functions of its flags and, once it is set up, of the Run."""

    start: Callable  # (config, info, resumed checkpoint or None) → constructor arguments; the model, or None: a new one
    objective: Callable  # (run) → function (network, batch, draws) → loss and {name: 0-d tensor} for the log
    draw: Callable  # (run, step) → the random draws of this rank's rows
    prepare: Callable  # (config) → config whose --data-dir can be opened


@dataclasses.dataclass
class Run:
    """A run that is set up."""

    config: RunFlags
    accelerator: object
    info: DataInfo
    dataset: object  # to train on; None in a dry run without data
    held: object  # the dataset of --holdout, or None
    options: dict  # constructor arguments of the model
    resumed: Path | None = None  # checkpoint to resume from
    model: torch.nn.Module | None = None  # made last
    sources: dict = dataclasses.field(default_factory=dict)  # {entry of the saved configuration: Source}

    def __post_init__(self):
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        self.weights = config.branch_weights(len(self.options["df_idxs"]) + 1)  # β of each branch
        self.rows = rows_of_rank(config.batch_size, world, config.gradient_accumulation_steps, rank)
        self.noise_block = BLOCK  # a resumed run keeps the value it began with
        self.sampler = SeekableSampler(self.info.count, config.batch_size, config.seed)
        self.stop_step = min(config.max_train_steps, config.epochs * self.sampler.steps_per_epoch)
        self.latent_shape = (self.info.spec.channels, *self.info.moments_shape[1:])  # (C, h, w)
        with torch.device("meta"):
            model = create_model(config.model, **self.options)
        self.parameters, self.flops = sum(p.numel() for p in model.parameters()), count_flops(model)
        self.flops_per_image = config.passes * 2 * self.flops.total_macs  # of a training step

    @functools.cached_property
    def targets(self):
        """The features to align with, as a function of a batch; None without alignment."""
        return Targets(self) if self.config.encoders() else None

    def saved(self):
        """What checkpoints and config.json record, JSON-like: flags, model, and data (classes, VAE, shapes)."""
        facts = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self.info).items()}
        spec = facts.pop("spec")
        sources = {name: dataclasses.asdict(source) for name, source in self.sources.items()}
        config = {**dataclasses.asdict(self.config), "model_options": self.options, **sources}
        return {"config": config, "data": {**facts, **spec}}


def run_task(config, task):
    """Train a Task as the flags say; a dry run only describes it. Raises InputError; may exit with EXIT_STOPPED."""
    given, config = given_flags(config), config.resolve()
    config.check()
    if not config.dry_run:
        check_tracker(config.report_to)
    accelerator = start_accelerator(config)  # early: processes prepare their data at different speeds
    config = task.prepare(config)
    info, dataset, held = open_data(config)
    if config.resolution not in (None, info.resolution):
        holds = f"which holds latents of {info.resolution}x{info.resolution} images"
        raise InputError(f"--resolution {config.resolution} contradicts --data-dir {config.data_dir}, {holds}")
    config = config.named(info.resolution)
    resumed = None
    if not config.dry_run:
        folder = next(path for path in (config.folder, *config.folder.parents) if path.exists())
        check_writable(folder / "config.json", "--output-dir")
        resumed = find_resume(config.folder, config.resume)
        if config.compile:
            keep_compiled(config.folder)
    options, model = task.start(config, info, resumed)
    run = Run(config, accelerator, info, dataset, held, options, resumed)
    run.accelerator.print(f"{given}\n{describe(run)}")
    if config.dry_run:
        run.accelerator.print(f"config.json: {json.dumps(run.saved()['config'], indent=1)}")
        return note("next: the same command without --dry-run")
    ends = [step for step in existing_steps(config.folder) if step >= run.stop_step]
    grids, complete = None, resumed in [checkpoint_path(config.folder, step) for step in ends]
    if config.sampling_steps and run.accelerator.is_main_process and not complete:  # the main process draws them
        codec = LatentCodec.load(config.vae or info.spec.vae, device=run.accelerator.device)
        grids = GridSampler(codec, dataset, config.folder, config.seed)
    torch.manual_seed(config.seed)
    run.model = create_model(config.model, **options) if model is None else model
    run.model.gradient_checkpointing = config.gradient_checkpointing
    objective = None if complete else task.objective(run)  # it may need a teacher, which may be gone by now
    trainer = Trainer(run, objective, functools.partial(task.draw, run), grids)
    finished = trainer.fit()
    if finished and not complete:  # for one that was complete before, the trainer says how to continue
        program = "generate_t2i.py --prompts 'a dog'" if config.kind == "text" else "generate.py"
        run.accelerator.print(f"results: {config.folder}\nnext: python {program} --ckpt {config.folder} --grid 4x4")
    run.accelerator.end_training()
    if not finished:
        sys.exit(EXIT_STOPPED)


def open_data(config):
    """DataInfo, dataset and held-out dataset or None.

    A dry run may go without any (None) and then assumes ImageNet's, or COCO's captions.
    """
    text = config.kind == "text"
    if config.dry_run and not Path(config.data_dir).exists():
        name, known = ("COCO", COCO) if text else ("ImageNet", IMAGENET)
        say(f"--data-dir {config.data_dir} does not exist: {name} and the usual encoders are assumed")
        preset, resolution = PRESETS[config.model], config.resolution or known["resolution"]
        spec, factor = LatentSpec(), known["resolution"] // preset.input_size
        if factor != spec.factor:
            spec = LatentSpec(f"of factor {factor}", channels=preset.in_channels, factor=factor)
        facts = (spec, (2 * spec.channels, *[resolution // spec.factor] * 2), resolution)
        if text:
            return CaptionInfo(known["count"], 0, *facts), None, None
        return DataInfo(known["count"], config.num_classes or known["num_classes"], *facts), None, None
    caches = find_caches(config)
    shared = {"features": tuple(caches), "data_vae": config.data_vae, "workers": config.num_workers}
    shared["images"] = len(caches) < len(config.encoders())
    classes, mirror = ({}, {}) if text else ({"num_classes": config.num_classes}, {"mirror": config.mirror})
    open_folder = functools.partial(open_captions if text else open_dataset, **classes, **shared)
    dataset, held = hold_out(config, open_folder(config.data_dir, **mirror), open_folder)
    return dataset.info, dataset, held


def given_flags(config):
    """The flags of a parsed configuration that differ from the program's defaults, as on the command line."""
    words = []
    for f in dataclasses.fields(config):
        if (value := getattr(config, f.name)) != f.default:
            words += words_of(f.metadata.get("name", shown(f.name)), value)
    return f"flags: {shlex.join(words) or 'all at their defaults'}"


def describe(run):
    """Summary before training: model and size, data, steps, output folder, and remarks."""
    config, epoch, steps, world = run.config, run.sampler.steps_per_epoch, run.stop_step, run.accelerator.num_processes
    flops = f"{2 * run.flops.total_macs / 1e9:.2f} GFLOP ({run.flops.paper_macs / 1e9:.2f} G multiply-adds as the paper"
    lines = [
        f"model: {config.model}, {run.parameters:,} parameters, forward pass of one sample {flops} counts them)",
        f"data: {config.data_dir}, {run.info}",
        f"training: {config.batch_size} samples per step, {epoch:,} steps per epoch, {steps:,} steps = "
        f"{steps / epoch:.1f} epochs, {world} processes, {config.gradient_accumulation_steps} micro-batches, "
        f"mixed precision {config.mixed_precision}",
        f"results: {config.folder}",
        *describe_alignment(config),
        *describe_holdout(run),
    ]
    if config.hours_on:
        hours = gpu_hours(run.flops_per_image, steps * config.batch_size, config.hours_on, config.mfu)
        rate = f"{100 * config.mfu:g}% of the bf16 peak"
        lines.append(f"{hours / world:,.1f} hours on {world} {config.hours_on} at {rate}, {hours:,.1f} GPU-hours")
    if (left := config.ema_decay**steps) > INITIAL_SHARE:
        share = f"after {steps:,} steps the averaged weights still contain {left:.0%} of the initial ones"
        lines.append(f"warning: --ema-decay {config.ema_decay}: {share}; lower it, or train longer")
    ends = [f"--epochs {config.epochs}", f"--max-train-steps {config.max_train_steps}"]  # the earlier end comes first
    if by_steps := steps < config.epochs * epoch:
        ends.reverse()
    if steps < config.max_train_steps or (by_steps and config.epochs != type(config).epochs):
        lines.append("note: {} ends the run before {}".format(*ends))
    return "\n".join(lines)
