"""Train a DeepFlow or SiT model on VAE latents.

    python train.py --exp-name first --model DeepFlow-B/2 --data-dir DATA
    accelerate launch train.py --exp-name b2 --model DeepFlow-B/2 --data-dir DATA --compile
    python train.py --exp-name birds --model DeepFlow-B/2 --data-dir BIRDS --init-from exps/b2 --new-classes

Writes OUTPUT_DIR/EXP_NAME: config.json, log.jsonl, checkpoints/0400000.pt, samples/.
"""

import functools

from common.errors import InputError, exit_on_input_error
from common.flags import parse_early, parse_flags
from training.config import EXIT_CODES, TrainConfig

if __name__ == "__main__":
    parse_early(TrainConfig, __doc__, EXIT_CODES)

from loss import alignment_loss, deepflow_loss
from models import model_config
from models.encoders import check_grid
from models.paths import PATHS
from preprocessing.direct import with_latents
from training.draws import draw_step
from training.run import Task, run_task
from training.start import start_model


def objective(network, batch, draws, *, config, dataset, weights, targets=None):
    """DeepFlow's loss on one micro-batch (equation 10), with alignment (REPA) → (scalar, parts for the log).

    Conditions are dropped here, not in the network. targets: features of a batch, None without alignment.
    """
    path = PATHS[config.path_type]
    x0 = dataset.info.spec.sample(batch.moments.float(), draws.posterior)
    y = dataset.drop(batch.condition, draws.drop)
    x = path.interpolate(x0, draws.noise, draws.times[0])
    out = network(x, list(draws.times), y)
    loss = deepflow_loss(out, x0, draws.noise, draws.times, path, weights, config.acc_coeff)
    total, parts = loss.total.mean(), {**loss.parts(), "latent_std": x0.std()}
    if targets is not None:
        aligned = alignment_loss(out.projections, targets(batch))
        total, parts = total + config.proj_coeff * aligned.mean(), {**parts, **targets.parts(aligned)}
    return total, parts


def start(config, info, resumed):
    """(constructor arguments, from preset, flags and data; the model of --init-from, or None for a new one)."""
    options = model_config(config.model, **config.model_flags(), **info.model_options())
    if config.encoder_depth is not None and options["df_idxs"]:
        raise InputError("--encoder-depth is for models of one branch; drop it: here VeRA's output is aligned")
    for name in config.encoders():
        check_grid(name, info.resolution, options["input_size"] // options["patch_size"])
    return options, None if resumed else start_model(config, options, info)


def objective_of(run):
    shared = {"config": run.config, "dataset": run.dataset, "weights": run.weights}
    return functools.partial(objective, **shared, targets=run.targets)


def draw(run, step):
    return draw_step(step, run.config, run.model.num_branches, run.latent_shape, run.rows, run.noise_block)


def train(config):
    """Train as the flags say; a folder of images is encoded first. Raises InputError."""
    run_task(config, Task(start, objective_of, draw, with_latents))


if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(TrainConfig, description=__doc__, epilog=EXIT_CODES))
