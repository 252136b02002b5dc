"""Run configurations as dataclasses: the flags of train*.py, saved as JSON with every run.

A run that is resumed keeps its flags, unless they are declared free: those change nothing, or the rounding at most.

RunFlags are common to all programs; FlowFlags and ClassFlags are added where a program has them. None means: taken from
the preset, the data or the machine.
"""

import dataclasses
import functools
import re
from pathlib import Path

import models  # its modules are imported on first use
from common.errors import EXIT_INTERRUPTED, EXIT_STOPPED, InputError, note
from common.flags import BATCH, BLOCKS, CLASSES, HIDDEN, IMAGES, SEED, SIDE, WORKERS, Range, flag, shown
from models.flags import ENCODERS, ConventionFlag
from models.gpus import MFU, PEAK_FLOPS
from models.presets import CLASS_MODELS, FLOW_MAPS, PRESETS, TEXT_MODELS
from training.settings import holdout_fraction, run_name

GROUPS = ("model", "loss", "data", "optimisation", "precision and speed", "output")
model_flag, loss_flag, data_flag, optim_flag, speed_flag, output_flag = (
    functools.partial(flag, group=group) for group in GROUPS
)
output_flag = functools.partial(output_flag, free=True)

AT_LEAST_0, AT_LEAST_1, POSITIVE, WIDTHS = Range(low=0), Range(low=1), Range(above=0), Range(1, 2**16)
THREADS = Range(low=0, high=WORKERS.high)
PROBABILITY, DECAY = Range(low=0, high=1), Range(low=0, below=1)
ATTENTION = ["auto", "base", "torch_sdpa", "fa2", "fa3"]
PROGRAMS = {"flow": "train.py", "flow map": "train_dmf.py", "text": "train_t2i.py"}  # of each kind of model
EXIT_CODES = (
    "On SIGTERM, SIGUSR1 and Ctrl-C the step is finished, a checkpoint is written and the exit code\n"
    f"is {EXIT_STOPPED}: the same command with --resume auto continues. A second Ctrl-C ends at once, with\n"
    f"{EXIT_INTERRUPTED}. 0: the run is complete; 2: a mistake, named by a line 'error: ...'."
)


def has_gpu():
    import torch  # seconds, and --help does not need it

    return torch.cuda.is_available()


@dataclasses.dataclass(kw_only=True)
class RunFlags:
    """The flags that all programs have. `kind` is the kind of model that a program trains, a key of PROGRAMS."""

    model: str
    trans_depth: int = model_flag(None, "blocks; alone it spaces the preset's branches evenly", int, range=BLOCKS)
    df_idxs: str | tuple = model_flag(None, "blocks (from 1) that end a branch: [8,16], 8,16 or 8 16", str, nargs="+")
    qk_norm: bool = model_flag(False, "normalise queries and keys")
    legacy_scaling: bool = model_flag(False, "clamp the time-gap scale to [-5, 5] as the SSL-aligned release does")
    init_from: str = model_flag(None, "start from these weights, ours or published", str, also=["--pretrained"])
    weights: str = model_flag("ema", "which weights of --init-from", choices=["ema", "raw"])

    path_type: str = loss_flag("linear", "probability path", choices=["linear", "cosine"])
    prediction: str = loss_flag("v", HIDDEN, choices=["v"])  # published commands pass it
    scale_weight: tuple[float, ...] = loss_flag(
        None, "weight of each branch's velocity loss (beta); default: 0.2 ... 0.2 1.0", float, nargs="+"
    )
    acc_coeff: float = loss_flag(1.0, "weight of the acceleration loss (lambda)", range=AT_LEAST_0)
    cfg_prob: float = loss_flag(0.1, "probability that a label is dropped", range=PROBABILITY)

    data_dir: str = data_flag("data/imagenet256", "folder of vae-sd/ and images/, or of class folders", free=True)
    resolution: int = data_flag(None, "image size; checked against the data", int, range=SIDE, free=True)
    data_vae: str = data_flag(None, "VAE that made latents without a manifest", str, free=True)
    num_workers: int = data_flag(
        None, "reading threads; default: 4, for images 1 per core", int, range=THREADS, free=True, also=["--workers"]
    )
    holdout: str = data_flag(None, "error on another data folder, or on this share of DATA_DIR, not trained on", str)
    holdout_every: int = data_flag(
        None, "its interval in steps; default: such that it costs 2 %% of training", int, range=AT_LEAST_1, free=True
    )
    holdout_count: int = data_flag(None, "images to measure; default: all held-out ones", int, range=IMAGES, free=True)

    batch_size: int = optim_flag(256, "samples per step, over all processes and micro-batches", range=BATCH)
    gradient_accumulation_steps: int = optim_flag(1, "micro-batches per step and process", range=BATCH, free=True)
    max_train_steps: int = optim_flag(400_000, "optimizer steps", range=AT_LEAST_1, free=True)
    epochs: int = optim_flag(1400, "passes over the data, if they end before the steps", range=AT_LEAST_1, free=True)
    learning_rate: float = optim_flag(1e-4, "constant learning rate of AdamW", range=POSITIVE)
    adam_beta1: float = optim_flag(0.9, "first moment decay", range=DECAY)
    adam_beta2: float = optim_flag(0.999, "second moment decay", range=DECAY)
    adam_weight_decay: float = optim_flag(0.0, "decoupled weight decay", range=AT_LEAST_0)
    adam_epsilon: float = optim_flag(1e-8, "denominator offset", range=POSITIVE)
    max_grad_norm: float = optim_flag(1.0, "gradients are clipped to this norm", range=POSITIVE)
    ema_decay: float = optim_flag(0.9999, "decay of the weights' exponential moving average", range=PROBABILITY)
    max_bad_steps: int = optim_flag(20, "non-finite steps in a row that end the run", range=AT_LEAST_1, free=True)
    seed: int = optim_flag(0, "seed of everything random", range=SEED)

    mixed_precision: str = speed_flag(None, "autocast; default: bf16 on GPU", str, choices=["no", "fp16", "bf16"])
    allow_tf32: bool = speed_flag(True, "TF32 matrix products on GPUs that have them", free=True, name="--tf32")
    fused_attn: bool = speed_flag(True, "fused attention kernels", free=True)
    gradient_checkpointing: bool = speed_flag(False, "recompute activations in backward, saving memory", free=True)
    compile: bool = speed_flag(False, "compile each kind of block: a slower start, faster steps", free=True)

    exp_name: str = output_flag(None, "name of the run, in OUTPUT_DIR; default: tells the variant", str)
    output_dir: str = output_flag("exps", "parent folder of all runs")
    logging_dir: str = output_flag("logs", "folder of tracker files inside the run's folder")
    report_to: str = output_flag("none", "tracker beside the JSONL log", choices=["none", "wandb", "tensorboard"])
    dry_run: bool = output_flag(False, "print the resolved configuration, parameters and FLOPs, then stop")
    hours_on: str = output_flag(None, "print the hours that the run takes on such GPUs", str, choices=list(PEAK_FLOPS))
    mfu: float = output_flag(MFU, "share of the GPU's peak that --hours-on assumes", range=Range(above=0, high=1))
    log_every: int = output_flag(100, "interval of log lines, in steps", range=AT_LEAST_1)
    checkpointing_steps: int = output_flag(200_000, "interval of checkpoints that stay, in steps", range=AT_LEAST_1)
    rolling_steps: int = output_flag(5_000, "interval of rolling checkpoints, in steps; 0: never", range=AT_LEAST_0)
    keep_last: int = output_flag(2, "number of rolling checkpoints to keep", range=AT_LEAST_1)
    sampling_steps: int = output_flag(10_000, "interval of sample grids, in steps; 0: never", range=AT_LEAST_0)
    vae: str = output_flag(None, "VAE that decodes sample grids (name or folder); default: that of the data", str)
    resume: str = output_flag(
        "0", "latest, auto (if there is one), a step (0: a fresh start) or a file of any run", also=["--resume-step"]
    )
    allow_changes: bool = output_flag(False, "resume with other flags than before; the change is recorded")

    def model_flags(self):
        """Constructor arguments of the model that have a flag; None: as in the preset."""
        names = ("df_idxs", "qk_norm", "legacy_scaling", "dmf_depth", "encoder_depth", "init", "vera", "acc_mlp")
        return {"depth": self.trans_depth, **{name: getattr(self, name) for name in names if hasattr(self, name)}}

    forward_passes = 1  # of each image in a training step

    @property
    def passes(self):
        """Cost of a training step in forward passes of each image; the backward pass costs two."""
        return self.forward_passes + 2

    def branch_weights(self, num_branches):
        """β of each branch: as given, else 0.2 … 0.2 1.0. Raises InputError when the count does not fit."""
        weights = list(self.scale_weight or [0.2] * (num_branches - 1) + [1.0])
        if len(weights) != num_branches:
            raise InputError(f"--scale-weight has {len(weights)} values for {num_branches} branches; give one for each")
        return weights

    def encoders(self):
        """{name: weights file, or None for the hub's} of the alignment encoders."""
        return {}

    @property
    def folder(self):
        """Path of the run's folder."""
        return Path(self.output_dir) / self.exp_name

    def resolve(self):
        """A copy in which defaults that depend on the machine are filled in."""
        precision = self.mixed_precision or ("bf16" if has_gpu() else "no")
        return dataclasses.replace(self, mixed_precision=precision)

    def named(self, resolution):
        """A copy with the data's resolution and with the name of the run, where --exp-name does not give one."""
        config = dataclasses.replace(self, resolution=resolution)
        return dataclasses.replace(config, exp_name=self.exp_name or run_name(config))

    def resumed(self, before):
        """A copy; without --init-from, it and the flags about it are those of `before`, the configuration to resume."""
        names = [name for name in ("init_from", "weights", "convention", "new_classes") if hasattr(self, name)]
        return self if self.init_from else dataclasses.replace(self, **{name: getattr(before, name) for name in names})

    def check(self):
        """Raise InputError for flags that contradict each other, the program or the machine."""
        if self.model not in PRESETS:
            names = (name for name, preset in PRESETS.items() if preset.kind == self.kind)
            raise InputError(f"--model {self.model!r} is unknown; choose one of {', '.join(names)}")
        if (kind := PRESETS[self.model].kind) != self.kind:
            raise InputError(f"--model {self.model} is trained with {PROGRAMS[kind]}; use that, or another model")
        name = self.exp_name
        if name is not None and not (re.fullmatch(r"[^./\\:\s][^/\\:]*", name) and name.isprintable()):
            raise InputError(f"--exp-name {name!r} must name a folder: no slash, colon or line break, no dot in front")
        if self.prediction != "v":
            raise InputError(f"--prediction {self.prediction} is unknown; the objective is defined for v")
        if self.mixed_precision == "fp16" and not (has_gpu() or self.dry_run):
            raise InputError("--mixed-precision fp16 needs a GPU; use no or bf16 on CPU")
        holdout_fraction(self.holdout)
        if self.holdout is None and (self.holdout_every or self.holdout_count):
            raise InputError("--holdout-every and --holdout-count need --holdout; give it a folder or a fraction")


@dataclasses.dataclass(kw_only=True)
class ClassFlags:
    """What datasets of labelled images have."""

    num_classes: int = data_flag(None, "number of classes, for data without a manifest", int, range=CLASSES, free=True)
    mirror: bool = data_flag(False, "use vae-sd-mirror instead of vae-sd for a random half of the images")


ALIGN = (
    "align VeRA's output (a block's, if single-branch) with a self-supervised encoder; default: single-branch models "
    "align if --enc-type, --encoder-depth or --proj-coeff is given, as in REPA"
)
TIMES = "distribution of t; lognormal means logit-normal, sigmoid(N(0, 1))"
ENCODER = "dinov2-vit-b"
ENCODER_NAMES = f"alignment encoders, None or comma-separated of {ENCODERS}; default: {ENCODER}"


@dataclasses.dataclass(kw_only=True)
class FlowFlags(ConventionFlag, RunFlags):
    """Alignment with self-supervised encoders (REPA), what connects the branches, and their times."""

    ssl_align: bool = loss_flag(None, ALIGN, bool)
    enc_type: str = loss_flag(None, ENCODER_NAMES, str)
    enc_ckpt: str = loss_flag(None, "the encoders' weight files, comma-separated; default: the hub's", str)
    encoder_depth: int = loss_flag(None, "block of a SiT (from 1) that is aligned; default: the preset's, 8 or 4", int)
    proj_coeff: float = loss_flag(None, "weight of the alignment loss; default: 0.5", float, range=AT_LEAST_0)
    vera: str = model_flag("full", "between branches, as in Table 7a: none, gap, acceleration or full")
    acc_mlp: tuple = model_flag(None, "widths of ACC_MLP; default: 2048 4096 2048", int, range=WIDTHS, nargs="+")
    weighting: str = loss_flag("lognormal", TIMES, choices=["uniform", "lognormal"])
    tg_upper_bound: float = loss_flag(
        None, "upper bound of branches' time gap (alpha); default: 0.01, --vera none: 0", float, range=PROBABILITY
    )

    def resolve(self):
        """As for every run; without VeRA all branches share one time (equation 4).

        Without --ssl-align, REPA's own flags switch on alignment for a single-branch model.
        """
        bound, aligned = self.tg_upper_bound, self.ssl_align
        if bound is None:
            bound = 0.0 if self.vera == "none" else 0.01
        if aligned is None:  # a resumed run's settings have it
            given = {name: getattr(self, name) for name in ("enc_type", "encoder_depth", "proj_coeff")}
            words = [f"{shown(name)} {value}" for name, value in given.items() if value not in (None, 0)]
            named = self.enc_type is None or bool(models.encoders.parse_enc_type(self.enc_type))
            aligned = bool(words) and named and not (self.df_idxs or getattr(PRESETS.get(self.model), "df_idxs", ()))
            if words and named and not aligned:
                note(f"warning: no alignment without --ssl-align; unused: {', '.join(words)}")
        weight = 0.5 if self.proj_coeff is None else self.proj_coeff
        filled = {"ssl_align": aligned, "enc_type": self.enc_type or ENCODER, "proj_coeff": weight}
        return dataclasses.replace(super().resolve(), tg_upper_bound=bound, **filled)

    def model_flags(self):
        """As of every run, and what alignment adds."""
        widths = [models.encoders.ENCODERS[name].width for name in self.encoders()]
        return {**super().model_flags(), "ssl_align": bool(widths), "z_dims": widths or None}

    def encoders(self):
        """{name: weights file, or None for the hub's}; empty without --ssl-align. Raises InputError."""
        names = models.encoders.parse_enc_type(self.enc_type or ENCODER)  # typos are refused even without --ssl-align
        files = models.encoders.parse_enc_ckpt(self.enc_ckpt, names)
        return dict(zip(names, files, strict=True)) if self.ssl_align else {}

    def check(self):
        super().check()
        if self.ssl_align and not self.encoders():
            raise InputError("--ssl-align has nothing to align with --enc-type None; name an encoder, or drop it")
        given = " and ".join(shown(name) for name in ("enc_ckpt", "encoder_depth") if getattr(self, name) is not None)
        if given and not self.ssl_align:
            names = models.encoders.parse_enc_type(self.enc_type or ENCODER)
            remedy = "pass --ssl-align, or drop it" if names else "with --enc-type None nothing is aligned; drop one"
            raise InputError(f"{given} without alignment: {remedy}")
        if self.vera == "none" and self.tg_upper_bound:
            raise InputError("--vera none has one time for all branches; drop --tg-upper-bound, or choose --vera gap")


@dataclasses.dataclass(kw_only=True)
class TrainConfig(ClassFlags, FlowFlags):
    """Flags of train.py."""

    kind = "flow"

    model: str = model_flag("DeepFlow-XL/2", "preset, one of " + ", ".join(CLASS_MODELS))
    new_classes: bool = model_flag(False, "the classes are not those of --init-from; start with a new label table")


@dataclasses.dataclass(kw_only=True)
class TextTrainConfig(FlowFlags):
    """Flags of train_t2i.py: no classes, and no mirrored images, as captions say left and right."""

    kind = "text"

    model: str = model_flag("DeepFlow-MMDiT-L/2", "preset, one of " + ", ".join(TEXT_MODELS))
    init: str = model_flag(None, "initialisation (repa: PyTorch's); default: preset's", str, choices=["dit", "repa"])
    weighting: str = loss_flag("uniform", TIMES, choices=["uniform", "lognormal"])
    cfg_prob: float = loss_flag(0.1, "probability that a caption becomes the empty one", range=PROBABILITY)
    data_dir: str = data_flag("data/coco256/train", "folder that holds vae-sd/ and text/, or U-ViT's", free=True)
    max_train_steps: int = optim_flag(150_000, "optimizer steps", range=AT_LEAST_1, free=True)


@dataclasses.dataclass(kw_only=True)
class FlowMapConfig(ClassFlags, ConventionFlag, RunFlags):
    """Flags of train_dmf.py."""

    kind = "flow map"

    model: str = model_flag("DMFT-XL/2", "preset, one of " + ", ".join(FLOW_MAPS))
    qk_norm: bool = model_flag(None, "normalise queries and keys; default: as in --init-from", bool)
    legacy_scaling: bool = model_flag(None, "clamp the time-gap scale to [-5, 5]; default: as in --init-from", bool)
    adam_beta2: float = optim_flag(0.95, "second moment decay", range=DECAY)

    weights: str = model_flag("ema", "which weights of --init-from and --teacher", choices=["ema", "raw"])
    from_scratch: bool = model_flag(False, "start from random weights instead of --init-from")
    dmf_depth: int = model_flag(None, "number of blocks that see t; the later ones see r", int, range=BLOCKS)
    attn_func: str = speed_flag("auto", "attention outside the derivative", choices=ATTENTION, free=True)

    g_type: str = loss_flag(
        "mg", "guidance: none, by the network itself, by a teacher", choices=["default", "mg", "distill"]
    )
    teacher: str = loss_flag(None, "frozen flow model of --g-type distill; default: --init-from", str)
    omega: float = loss_flag(0.6, "guidance weight", range=AT_LEAST_0)
    g_min: float = loss_flag(0.0, "guide only at t >= this (t = 0 is data)", range=PROBABILITY)
    g_max: float = loss_flag(0.7, "guide only at t <= this (t = 1 is noise)", range=PROBABILITY)
    P_mean: float = loss_flag(0.0, "flow part: mean of the logit of t")
    P_std: float = loss_flag(1.0, "flow part: standard deviation of the logit of t", range=AT_LEAST_0)
    P_mean_t: float = loss_flag(0.4, "mean-flow part: mean of the first time's logit")
    P_std_t: float = loss_flag(1.0, "mean-flow part: standard deviation of the first time's logit", range=AT_LEAST_0)
    P_mean_r: float = loss_flag(-1.2, "mean-flow part: mean of the second time's logit")
    P_std_r: float = loss_flag(1.0, "mean-flow part: standard deviation of the second time's logit", range=AT_LEAST_0)
    deep_supervision: bool = loss_flag(True, "with a DeepFlow backbone: keep its branches' losses for the flow part")

    @property
    def forward_passes(self):
        """Of each image: both parts, a derivative, guidance of 3 in 4 rows, as published."""
        return 2 + 2 + {"default": 0, "mg": 3, "distill": 3.5}[self.g_type]

    @property
    def passes(self):
        """As of every run; both parts have a backward pass."""
        return self.forward_passes + 2 * 2

    def resolve(self):
        """As of every run; distillation drops no labels."""
        config = super().resolve()
        if self.g_type != "distill":
            return config
        return dataclasses.replace(config, cfg_prob=0.0, teacher=self.teacher or self.init_from)

    def resumed(self, before):
        """As in other runs; with --teacher, --weights and --convention stay, as they also apply to the teacher."""
        if self.init_from or self.from_scratch:
            return self
        own = {"weights": self.weights, "convention": self.convention} if self.teacher else {}
        return dataclasses.replace(super().resumed(before), from_scratch=before.from_scratch, **own)

    def check(self):
        super().check()
        if self.g_min > self.g_max:
            raise InputError(f"--g-min {self.g_min} must not exceed --g-max {self.g_max}")
        if self.init_from and self.from_scratch:
            raise InputError("--init-from and --from-scratch exclude each other; pass one of them")
        if self.g_type == "distill" and not self.teacher:
            raise InputError("--g-type distill needs a flow model as teacher: pass --teacher, or --init-from")
        if self.teacher and self.g_type != "distill":
            raise InputError(f"--teacher is for --g-type distill, not {self.g_type}; drop it")
        if self.teacher and not (Path(self.teacher).exists() or models.hub.is_on_hub(self.teacher)):  # it is read late
            raise InputError(f"--teacher {self.teacher} does not exist; name the file of a flow model")
        if self.g_type == "mg" and self.cfg_prob == 0 and self.from_scratch:
            raise InputError("--g-type mg needs a null class, which --cfg-prob 0 never trains; raise it")
