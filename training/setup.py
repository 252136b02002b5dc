"""What every train_*.py does before its loop: open the data, describe the run, start the tracker."""

import dataclasses
from pathlib import Path

import torch

from dataset import DataInfo, open_dataset
from models import create_model
from models.codec import LatentSpec
from models.encoders import parse_enc_type
from models.flops import count_flops
from models.presets import IMAGENET
from training.alignment import feature_sources, find_caches
from training.config import TrainConfig
from training.loader import SeekableSampler


def open_data(config):
    """The dataset's DataInfo and the dataset; a dry run may go without one and then assumes ImageNet's."""
    if config.dry_run and not Path(config.data_dir).exists():
        print(f"--data-dir {config.data_dir} does not exist: ImageNet and its usual VAE are assumed", flush=True)
        spec, classes = LatentSpec(), config.num_classes or IMAGENET["num_classes"]
        resolution = config.resolution or IMAGENET["resolution"]
        side = resolution // spec.factor
        return DataInfo(IMAGENET["count"], classes, spec, (2 * spec.channels, side, side), resolution), None
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


def describe(config, options, info, accelerator):
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
        f"{steps / sampler.steps_per_epoch:.1f} epochs, {accelerator.num_processes} processes, "
        f"{config.gradient_accumulation_steps} micro-batches, mixed precision {config.mixed_precision}",
    ]
    lines += [f"alignment, weight {config.proj_coeff}: {source}" for source in feature_sources(config)]
    if parse_enc_type(config.enc_type) and not config.ssl_align:
        given = "note" if config.enc_type == TrainConfig.enc_type else "warning"
        lines.append(f"{given}: no alignment: --enc-type {config.enc_type} is unused without --ssl-align")
    if steps * (1 - config.ema_decay) < 5:
        lines.append(f"warning: --ema-decay {config.ema_decay} averages over more than the run's {steps} steps")
    if steps < config.max_train_steps:
        lines.append(f"note: --epochs {config.epochs} ends the run before --max-train-steps {config.max_train_steps}")
    return "\n".join(lines)


def start_trackers(accelerator, config):
    """Tell the tracker of --report-to the run's flags; a resumed run goes on under its own name."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, int | float | str)}
    wandb = {"name": config.exp_name, "id": config.exp_name, "resume": "allow"}
    accelerator.init_trackers("deepflow", config=flags, init_kwargs={"wandb": wandb})
