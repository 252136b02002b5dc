"""Turn a flow model into a flow map that samples in one to four steps (Decoupled MeanFlow).

    accelerate launch train_dmf.py --exp-name map --model DMFT-XL/2 --pretrained SiT-XL-2.pt --data-dir DATA
    python train_dmf.py --exp-name map --model DeepFlow-DMF-B/2 --pretrained exps/b/checkpoints/0400000.pt

Everything else is as in train.py. The curves to watch are error_flow and error_map of log.jsonl: the loss itself is a
logarithm whose level says little.
"""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import ClassVar

import torch

from common.errors import InputError, exit_on_input_error, note
from common.flags import flag, parse_flags, shown
from loss import (
    GUIDED_VELOCITIES,
    GuidedTarget,
    deepflow_loss,
    flow_map_loss,
    flow_map_targets,
)
from models import PRESETS, create_model, load_checkpoint, model_config
from models.attention import ATTENTION, set_attention
from models.codec import LatentCodec, LatentSpec
from models.deepflow import DeepFlowOutput
from models.flops import count_flops
from models.flow_map import to_flow_map
from models.paths import PATHS
from models.presets import FLOW_MAPS
from training.checkpoint import find_resume
from training.config import TrainConfig
from training.distributed import rows_of_rank, start_accelerator
from training.draws import draw_flow_map_step
from training.grids import FlowMapGridSampler
from training.setup import describe, open_data, start_trackers
from training.stop import EXIT_CODES, EXIT_STOPPED
from training.trainer import Trainer, describe_data

TOLERANCE = 1e-4  # of u(x, t, t, y) against the flow model's velocity


@dataclasses.dataclass
class FlowMapConfig(TrainConfig):
    """What train_dmf.py can be told: train.py's flags and those of a flow map."""

    # flags of train.py that a flow map has no use for
    weighting: ClassVar = "uniform"
    tg_upper_bound: ClassVar = 0.0
    ssl_align: ClassVar = False
    enc_type: ClassVar = "None"
    enc_ckpt: ClassVar = None
    encoder_depth: ClassVar = None
    proj_coeff: ClassVar = 0.0

    model: str = flag("DMFT-XL/2", "preset, one of " + ", ".join(FLOW_MAPS))
    qk_norm: bool = flag(None, "normalise queries and keys; default: as --pretrained", bool)
    legacy_scaling: bool = flag(None, "clamp the time-gap scale to [-5, 5]; default: as --pretrained", bool)
    adam_beta2: float = flag(0.95, "second moment decay")

    pretrained: str = flag(None, "flow model to start from: a checkpoint of ours or a published file", str)
    weights: str = flag("ema", "which weights of --pretrained and --teacher", choices=["ema", "raw"])
    from_scratch: bool = flag(False, "start from random weights instead of --pretrained")
    dmf_depth: int = flag(None, "number of blocks that see t; the later ones see r", int)
    attn_func: str = flag("auto", "attention kernel outside the derivative pass", choices=list(ATTENTION))

    g_type: str = flag("mg", "guided velocity: none, of the network itself, of a teacher", choices=GUIDED_VELOCITIES)
    teacher: str = flag(None, "frozen flow model of --g-type distill; default: --pretrained", str)
    omega: float = flag(0.6, "guidance weight")
    g_min: float = flag(0.0, "guide only at t >= this (t = 0 is data)")
    g_max: float = flag(0.7, "guide only at t <= this (t = 1 is noise)")
    P_mean: float = flag(0.0, "flow part: mean of the logit of t")
    P_std: float = flag(1.0, "flow part: standard deviation of the logit of t")
    P_mean_t: float = flag(0.4, "mean-flow part: mean of the first time's logit")
    P_std_t: float = flag(1.0, "mean-flow part: standard deviation of the first time's logit")
    P_mean_r: float = flag(-1.2, "mean-flow part: mean of the second time's logit")
    P_std_r: float = flag(1.0, "mean-flow part: standard deviation of the second time's logit")
    deep_supervision: bool = flag(True, "of a DeepFlow backbone: keep its branches' losses for the flow part")

    def time_means(self):
        """Means of the logits of t_fm and of the two times of the mean-flow part."""
        return self.P_mean, self.P_mean_t, self.P_mean_r

    def time_stds(self):
        """Standard deviations of the same."""
        return self.P_std, self.P_std_t, self.P_std_r

    def check(self):
        """Raise InputError for a value out of range, naming the flag; distillation drops no labels."""
        if self.g_type == "distill":
            self.cfg_prob = 0.0
        super().check()
        if not 0 <= self.g_min <= self.g_max <= 1:
            raise InputError(f"--g-min {self.g_min} and --g-max {self.g_max} must satisfy 0 <= g-min <= g-max <= 1")
        for name in ("omega", "P_std", "P_std_t", "P_std_r"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{shown(name)} {getattr(self, name)} must not be negative or infinite")
        if self.model not in FLOW_MAPS:
            raise InputError(f"--model {self.model!r} is not a flow map; choose one of {', '.join(FLOW_MAPS)}")
        for name in ("P_mean", "P_mean_t", "P_mean_r"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{shown(name)} {getattr(self, name)} must be finite")
        if self.pretrained and self.from_scratch:
            raise InputError("--pretrained and --from-scratch exclude each other")
        if self.g_type == "distill" and not (self.teacher or self.pretrained):
            raise InputError("--g-type distill needs a flow model as teacher: pass --teacher, or --pretrained")
        if self.teacher and self.g_type != "distill":
            raise InputError(f"--teacher is for --g-type distill, not {self.g_type}")
        if self.g_type == "mg" and self.cfg_prob == 0 and self.from_scratch:
            raise InputError("--g-type mg needs a null class, which --cfg-prob 0 never trains; raise it")


def load_flow(path, config, info, name):
    """Checkpoint of a flow model, made sure to fit the data; name: the flag that gave `path`. Raises InputError."""
    checkpoint = load_checkpoint(path, config.weights, df_idxs=config.df_idxs, legacy_scaling=config.legacy_scaling)
    facts = {"num_classes": info.num_classes, "in_channels": info.spec.channels, "input_size": info.moments_shape[1]}
    for key, wanted in facts.items():
        if checkpoint.options.get(key) != wanted:
            raise InputError(f"--{name} {path} has {key} {checkpoint.options.get(key)}, --data-dir has {wanted}")
    if checkpoint.run.get("path_type", config.path_type) != config.path_type:
        raise InputError(f"--{name} {path} was trained on another --path-type, {checkpoint.run['path_type']}")
    names = {field.name for field in dataclasses.fields(LatentSpec)}
    spec = LatentSpec(**{key: value for key, value in checkpoint.data.items() if key in names})
    if checkpoint.data:
        info.spec.check_same(spec, "--data-dir", f"--{name} {path}")
    return checkpoint


def check_preset(config, options, source):
    """Raise InputError where --model or its flags name another network than the file `source` (with its flag) holds."""
    preset = PRESETS[config.model]
    wanted = {"hidden_size": preset.hidden_size, "patch_size": preset.patch_size, "num_heads": preset.num_heads}
    wanted["depth"] = config.trans_depth or preset.depth
    for key, value in wanted.items():
        if options[key] != value:
            raise InputError(f"{source} has {key} {options[key]}, --model {config.model} {value}")
    if bool(options["df_idxs"]) != bool(preset.df_idxs):
        kind = "DeepFlow-DMF" if options["df_idxs"] else "DMFT"
        raise InputError(f"{source} has key layers {options['df_idxs']}; choose a {kind} preset")
    if config.qk_norm not in (None, bool(options["qk_norm"])):
        raise InputError(f"--qk-norm contradicts {source}, which has {options['qk_norm']}")


def start(config, info, resumed):
    """The run's flow map and its constructor arguments; resumed: the run's checkpoint, which alone is then needed."""
    if resumed:
        return start_from_file(resumed, config, info, "resume")
    if config.from_scratch:
        return start_from_scratch(config, info)
    if not config.pretrained:
        raise InputError("--pretrained is missing: name the flow model to start from, or pass --from-scratch")
    return start_from_file(config.pretrained, config, info, "pretrained")


def start_from_file(path, config, info, name):
    """The flow map of a file and its constructor arguments; of a flow model after the check that with r = t it is it.

    name: the flag that gave `path`. Raises InputError.
    """
    checkpoint, source = load_flow(path, config, info, name), f"--{name} {path}"
    check_preset(config, checkpoint.options, source)
    depth, own = config.dmf_depth, checkpoint.options.get("dmf_depth")
    if name == "resume" and not own:
        raise InputError(f"{source} is a flow model; start a run from it with --pretrained")
    if own and checkpoint.run and depth not in (None, own):
        raise InputError(f"--dmf-depth {depth} contradicts {source}, a flow map with {own}")
    if name == "pretrained" and config.g_type == "mg" and config.cfg_prob == 0 == checkpoint.run.get("cfg_prob"):
        raise InputError(f"--g-type mg needs a null class, which --cfg-prob 0 never trains, nor did {source}; raise it")
    if depth is None:
        depth = own or PRESETS[config.model].dmf_depth
    model, options = to_flow_map(checkpoint.options, checkpoint.model.state_dict(), depth)
    if name == "pretrained":
        check_conversion(checkpoint.model, model)
    return model, options


@torch.no_grad()
def check_conversion(flow, model, n=4):
    """Note how far u(x, t, t, y) is from the flow model's velocity on a batch; InputError if too far."""
    g = torch.Generator().manual_seed(0)
    side = int(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    x, t = torch.randn(n, model.in_channels, side, side, generator=g), torch.rand(n, generator=g)
    y = torch.arange(n) % (model.num_classes + 1)
    v = flow.velocity(x, t, y)
    difference = ((model.average_velocity(x, t, t, y) - v).abs().max() / v.abs().max().clamp_min(1e-12)).item()
    note(f"u(x, t, t, y) is the flow model's velocity up to a relative difference of {difference:.1e}")
    if not difference <= TOLERANCE:
        raise InputError("--pretrained is converted wrongly: u(x, t, t, y) is not its velocity; use another file")


def start_from_scratch(config, info):
    """A flow map of random weights and its constructor arguments."""
    options = model_config(
        config.model,
        depth=config.trans_depth,
        df_idxs=config.df_idxs,
        dmf_depth=config.dmf_depth,
        qk_norm="rms" if config.qk_norm else False,
        legacy_scaling=config.legacy_scaling,
        num_classes=info.num_classes,
        in_channels=info.spec.channels,
        input_size=info.moments_shape[1],
    )
    return create_model(config.model, **options), options


def guided_target(config, model, info, device):
    """The GuidedTarget of --g-type."""
    source = model
    if config.g_type == "distill":
        path = config.teacher or config.pretrained
        teacher = load_flow(path, config, info, "teacher")
        if teacher.run.get("cfg_prob") == 0 and config.omega != 1:
            raise InputError(f"--teacher {path} has no null class, it was trained with --cfg-prob 0; pass --omega 1")
        source = teacher.model.to(device)
    velocity = torch.compile(source.velocity, fullgraph=True) if config.compile else source.velocity
    return GuidedTarget(config.g_type, config.omega, velocity, info.num_classes)


def objective(network, batch, draws, *, model, guide, autocast, config, info, weights):
    """The loss of one micro-batch → (scalar, parts for the log).

    Targets come from the bare `model` without gradient, the gradient from one forward pass through `network`, the
    wrapper: a derivative through the wrapper fails, and gradients from the bare model would not be synchronised.
    """
    path = PATHS[config.path_type]
    x0 = info.spec.sample(batch.moments.float(), draws.posterior)
    y = torch.where(draws.drop, info.num_classes, batch.labels)
    with autocast():
        targets = flow_map_targets(model, guide, x0, y, draws, path)
    out = network(targets.x, targets.t, targets.y, targets.r)
    loss = flow_map_loss(out.velocities[-1], out.log_variance, targets.target)
    total = loss.total.mean()
    parts = {"latent_std": x0.std(), **map_parts(loss, targets, out)}
    if out.accelerations:
        deep = branch_losses(out, x0, draws, targets, path, weights, config.acc_coeff)
        total, parts = total + deep.total.mean(), {**parts, **deep.parts()}
    return total, parts


def map_parts(loss, targets, out):
    """Batch means for the log: summed errors and adaptive losses of both parts, |du/dt|, guided share, log-variance."""
    error_flow, error_map = loss.error.detach().mean(dim=1)
    loss_flow, loss_map = loss.adaptive.detach().mean(dim=1)
    return {
        "error_flow": error_flow,
        "error_map": error_map,
        "loss_flow": loss_flow,
        "loss_map": loss_map,
        "du_dt_norm": targets.derivative.flatten(1).norm(dim=1).mean(),
        "guided_fraction": targets.guided,
        "log_variance": out.log_variance.detach().mean(),
    }


def branch_losses(out, x0, draws, targets, path, weights, acc_coeff):
    """DeepFlowLoss of the intermediate branches at the flow part's rows; the final branch has its own loss."""
    n = len(x0)
    flow_rows = DeepFlowOutput([v[:n] for v in out.velocities], [a[:n] for a in out.accelerations], [])
    times = targets.t[:n].expand(len(out.velocities), n)
    weights = [*weights[:-1], 0.0]
    return deepflow_loss(flow_rows, x0, draws.noise, times, path, weights, acc_coeff, targets.target[:n])


def flops_per_image(config, model):
    """FLOP of one training step for one sample: two passes forward and backward, a derivative, guidance."""
    guidance = 0 if config.g_type == "default" else 4
    return (2 * 3 + 2 + guidance) * 2 * count_flops(model).total_macs


def train(config):
    """Wire data, model, objective and loop of one run."""
    config.check()
    set_attention(config.attn_func)
    run_dir = Path(config.output_dir) / config.exp_name
    info, dataset = open_data(config)
    resumed = None if config.dry_run else find_resume(run_dir, config.resume)
    torch.manual_seed(config.seed)  # of the log-variance head, or of all weights
    model, options = start(config, info, resumed)
    weights = config.branch_weights(model.num_branches)
    accelerator = start_accelerator(config, run_dir)
    rows_of_rank(config.batch_size, accelerator.num_processes, config.gradient_accumulation_steps, 0)
    accelerator.print(describe(config, options, info, accelerator))
    if config.dry_run:
        return
    grids = None
    if config.sampling_steps and accelerator.is_main_process:
        codec = LatentCodec.load(config.vae or info.spec.vae, device=accelerator.device)
        grids = FlowMapGridSampler(codec, dataset, run_dir, config.seed)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.supervise_branches(config.deep_supervision)
    guide = guided_target(config, model, info, accelerator.device)
    if config.compile:
        model.compile_derivative()
    shared = {"config": config, "info": info, "weights": weights}
    latent_shape = (info.spec.channels, *info.moments_shape[1:])
    trainer = Trainer(
        accelerator,
        config,
        run_dir,
        model,
        dataset,
        objective=functools.partial(objective, model=model, guide=guide, autocast=accelerator.autocast, **shared),
        draw=functools.partial(draw_flow_map_step, config=config, latent_shape=latent_shape),
        saved={"config": {**dataclasses.asdict(config), "model_options": options}, "data": describe_data(dataset)},
        on_sample=grids,
        flops_per_image=flops_per_image(config, model),
    )
    start_trackers(accelerator, config)
    finished = trainer.fit()
    accelerator.end_training()
    if not finished:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    with exit_on_input_error():
        train(parse_flags(FlowMapConfig, description=__doc__.splitlines()[0], epilog=EXIT_CODES))
