"""Turn a flow model into a flow map that samples in one to four steps (Decoupled MeanFlow).

    accelerate launch train_dmf.py --exp-name map --model DMFT-XL/2 --init-from SiT-XL-2.pt --data-dir DATA
    python train_dmf.py --exp-name map --model DeepFlow-DMF-B/2 --init-from exps/b/checkpoints/0400000.pt

Flags shared with train.py mean the same. The curves to watch are error_flow and error_map of log.jsonl: the loss
itself is a logarithm whose level says little.
"""

import functools

from common.errors import exit_on_input_error
from common.flags import parse_early, parse_flags
from training.config import EXIT_CODES, FlowMapConfig

if __name__ == "__main__":
    parse_early(FlowMapConfig, __doc__, EXIT_CODES)

import torch

from loss import deepflow_loss, flow_map_loss, flow_map_targets
from models.deepflow import DeepFlowOutput
from models.paths import PATHS
from preprocessing.direct import with_latents
from training.draws import draw_flow_map_step
from training.flow_map import guided_target, start
from training.run import Task, run_task


def objective(network, batch, draws, *, model, guide, autocast, config, info, weights):
    """Decoupled MeanFlow's loss on one micro-batch, with DeepFlow's on its branches → (scalar, parts for the log).

    Targets come from the bare `model` without gradient, the gradient from one forward pass through `network`, the
    wrapper: a derivative through the wrapper fails, and gradients from the bare model are not synchronised.
    """
    path = PATHS[config.path_type]
    x0 = info.spec.sample(batch.moments.float(), draws.posterior)
    y = torch.where(draws.drop, info.num_classes, batch.condition)
    with autocast():
        targets = flow_map_targets(model, guide, x0, y, draws, path)
    out = network(targets.x, targets.t, targets.y, targets.r)
    loss = flow_map_loss(out.velocities[-1], out.log_variance, targets.target)
    total = loss.total.mean()
    parts = {"latent_std": x0.std(), **map_parts(loss, targets, out)}
    if len(out.velocities) > 1:
        deep = branch_losses(out, x0, draws, targets, path, weights, config.acc_coeff)
        total, parts = total + deep.total.mean(), {**parts, **deep.parts()}
    return total, parts


def map_parts(loss, targets, out):
    """Batch means for the log: summed errors and adaptive losses of both parts, |du/dt|, guided share, log-variance."""
    parts = dict(zip(("error_flow", "error_map"), loss.error.detach().mean(dim=1), strict=True))
    parts |= zip(("loss_flow", "loss_map"), loss.adaptive.detach().mean(dim=1), strict=True)
    parts["du_dt_norm"] = targets.derivative.flatten(1).norm(dim=1).mean()
    return {**parts, "guided_fraction": targets.guided, "log_variance": out.log_variance.detach().mean()}


def branch_losses(out, x0, draws, targets, path, weights, acc_coeff):
    """DeepFlowLoss of the intermediate branches at the flow part's rows; the final branch has its own loss."""
    n = len(x0)
    flow_rows = DeepFlowOutput([v[:n] for v in out.velocities], [a[:n] for a in out.accelerations], [])
    times = targets.t[:n].expand(len(out.velocities), n)
    weights = [*weights[:-1], 0.0]
    return deepflow_loss(flow_rows, x0, draws.noise, times, path, weights, acc_coeff, targets.target[:n])


def objective_of(run):
    shared = {"config": run.config, "info": run.info, "weights": run.weights, "autocast": run.accelerator.autocast}
    return functools.partial(objective, model=run.model, guide=guided_target(run), **shared)


def draw(run, step):
    return draw_flow_map_step(step, run.config, run.latent_shape, run.rows, run.noise_block)


def train(config):
    """Train as the flags say. Raises InputError."""
    run_task(config, Task(start, objective_of, draw, with_latents))


if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(FlowMapConfig, description=__doc__, epilog=EXIT_CODES))
