"""Train a DeepFlow or SiT model on VAE latents.

    python train.py --exp-name first --model DeepFlow-B/2 --data-dir DATA
    accelerate launch train.py --exp-name b2 --model DeepFlow-B/2 --data-dir DATA --weighting lognormal

Writes OUTPUT_DIR/EXP_NAME: config.json, log.jsonl, checkpoints/0400000.pt, samples/.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import torch

from common.errors import InputError, exit_on_input_error
from common.flags import parse_flags
from loss import alignment_loss, deepflow_loss
from models import create_model, model_config
from models.codec import LatentCodec
from models.encoders import ENCODERS, check_grid
from models.flops import count_flops
from models.paths import PATHS
from models.presets import FLOW_MAPS, PRESETS, TEXT_MODELS
from training.alignment import make_targets
from training.checkpoint import find_resume
from training.config import TrainConfig
from training.distributed import rows_of_rank, start_accelerator
from training.draws import draw_step
from training.grids import GridSampler
from training.setup import describe, open_data, start_trackers
from training.stop import EXIT_CODES, EXIT_STOPPED
from training.trainer import Trainer, describe_data


def model_options(config, info):
    """Constructor arguments of the run's model: preset, flags, and what the data says. Raises InputError."""
    if config.model in FLOW_MAPS:
        raise InputError(f"--model {config.model} is a flow map; train it with train_dmf.py")
    if config.resolution is not None and config.resolution != info.resolution:
        raise InputError(
            f"--resolution {config.resolution} contradicts --data-dir {config.data_dir}, which holds latents of "
            f"{info.resolution}x{info.resolution} images"
        )
    encoders, from_data = config.encoders(), info.model_options()
    if config.model in PRESETS and (config.model in TEXT_MODELS) != ("context_dim" in from_data):
        script = "train_t2i.py" if config.model in TEXT_MODELS else "train.py"
        raise InputError(f"--model {config.model} is trained with {script}; take that, or another model")
    options = model_config(
        config.model,
        **config.model_flags(),
        **from_data,
        ssl_align=bool(encoders),
        z_dims=[ENCODERS[name].width for name in encoders] or None,
    )
    if config.encoder_depth is not None and options["df_idxs"]:
        raise InputError("--encoder-depth is for models of one branch; this one is aligned after its VeRA blocks")
    for name in encoders:
        check_grid(name, info.resolution, options["input_size"] // options["patch_size"])
    return options


def objective(network, batch, draws, *, config, dataset, weights, targets=None):
    """DeepFlow's loss on one micro-batch → (scalar, parts for the log). Labels are dropped here, not in the network."""
    path = PATHS[config.path_type]
    x0 = dataset.info.spec.sample(batch.moments.float(), draws.posterior)
    y = dataset.drop(batch.labels, draws.drop)
    x = path.interpolate(x0, draws.noise, draws.times[0])
    out = network(x, list(draws.times), y)
    loss = deepflow_loss(out, x0, draws.noise, draws.times, path, weights, config.acc_coeff)
    total, parts = loss.total.mean(), {**loss.parts(), "latent_std": x0.std()}
    if targets is not None:
        aligned = alignment_loss(out.projections, targets(batch))
        total, parts = total + config.proj_coeff * aligned.mean(), {**parts, **targets.parts(aligned)}
    return total, parts


def train(config, open_data=open_data):
    """Wire data, model, objective and loop of one run; open_data: configuration → DataInfo and dataset."""
    config.check()
    run_dir = Path(config.output_dir) / config.exp_name
    info, dataset = open_data(config)
    options = model_options(config, info)
    weights = config.branch_weights(len(options["df_idxs"]) + 1)
    accelerator = start_accelerator(config, run_dir)
    rows_of_rank(config.batch_size, accelerator.num_processes, config.gradient_accumulation_steps, 0)
    accelerator.print(describe(config, options, info, accelerator))
    if config.dry_run:
        return
    find_resume(run_dir, config.resume)  # a run that may not start says so before anything is loaded
    grids = None
    if config.sampling_steps and accelerator.is_main_process:
        codec = LatentCodec.load(config.vae or info.spec.vae, device=accelerator.device)
        grids = GridSampler(codec, dataset, run_dir, config.seed)
    targets = make_targets(config, dataset, options, accelerator)
    torch.manual_seed(config.seed)
    model = create_model(config.model, **options)
    model.gradient_checkpointing = config.gradient_checkpointing
    latent_shape = (info.spec.channels, *info.moments_shape[1:])
    trainer = Trainer(
        accelerator,
        config,
        run_dir,
        model,
        dataset,
        objective=functools.partial(objective, config=config, dataset=dataset, weights=weights, targets=targets),
        draw=functools.partial(draw_step, config=config, num_branches=model.num_branches, latent_shape=latent_shape),
        saved={"config": {**dataclasses.asdict(config), "model_options": options}, "data": describe_data(dataset)},
        on_sample=grids,
        flops_per_image=3 * 2 * count_flops(model).total_macs,  # the backward pass takes two of the forward's
    )
    start_trackers(accelerator, config)
    finished = trainer.fit()
    accelerator.end_training()
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(TrainConfig, description=__doc__.splitlines()[0], epilog=EXIT_CODES))
