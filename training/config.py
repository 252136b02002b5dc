"""Run configurations as dataclasses: the flags, their help and defaults in one place, saved as JSON with every run."""

import dataclasses
import json
import math

from common.errors import InputError
from common.flags import flag, required, shown
from loss import WEIGHTINGS
from models.encoders import ENCODERS, parse_enc_ckpt, parse_enc_type
from models.paths import PATHS
from models.presets import CLASS_MODELS


@dataclasses.dataclass
class TrainConfig:
    """What train.py can be told. None means: taken from the preset, the data or the machine."""

    exp_name: str = required("name of the run; results go to OUTPUT_DIR/EXP_NAME")
    data_dir: str = flag("data/imagenet256", "folder that holds images/ and vae-sd/, or packed shards")
    output_dir: str = flag("exps", "parent folder of all runs")
    logging_dir: str = flag("logs", "folder of tracker files inside the run's folder")
    report_to: str = flag("none", "tracker beside the JSONL log", choices=["none", "wandb", "tensorboard"])
    dry_run: bool = flag(False, "print the resolved configuration, parameters and FLOPs, then stop")

    model: str = flag("DeepFlow-XL/2", "preset, one of " + ", ".join(CLASS_MODELS))
    trans_depth: int = flag(None, "number of blocks; alone it spaces the preset's branches evenly", int)
    df_idxs: str = flag(None, "blocks (from 1) after which a branch ends: [8,16], 8,16 or 8 16", str, nargs="+")
    qk_norm: bool = flag(False, "normalise queries and keys")
    fused_attn: bool = flag(True, "fused attention kernels")
    legacy_scaling: bool = flag(False, "clamp the time-gap scale to [-5, 5] as the SSL-aligned release does")

    path_type: str = flag("linear", "probability path", choices=list(PATHS))
    prediction: str = flag("v", "what the network predicts; v is the only choice", choices=["v"])
    weighting: str = flag("uniform", "distribution of t", choices=list(WEIGHTINGS))
    tg_upper_bound: float = flag(0.01, "upper bound of the time gap between branches (alpha)")
    scale_weight: float = flag(
        None, "weight of each branch's velocity loss (beta); None is 0.2 ... 0.2 1.0", float, nargs="+"
    )
    acc_coeff: float = flag(1.0, "weight of the acceleration loss (lambda)")
    cfg_prob: float = flag(0.1, "probability that a label is dropped")
    ssl_align: bool = flag(False, "align VeRA's output (of a SiT: a block's) with a self-supervised encoder")
    enc_type: str = flag("dinov2-vit-b", "alignment encoders, None or comma-separated of " + ", ".join(ENCODERS))
    enc_ckpt: str = flag(None, "the encoders' weight files, comma-separated; default: the hub's", str)
    encoder_depth: int = flag(
        None, "block of a SiT (from 1) that is aligned; default: the preset's, 8, or 4 for B", int
    )
    proj_coeff: float = flag(0.5, "weight of the alignment loss")

    resolution: int = flag(None, "image size; checked against the data", int)
    num_classes: int = flag(None, "number of classes, for data without a manifest", int)
    mirror: bool = flag(False, "take vae-sd-mirror instead of vae-sd for a coin flip's half of the images")
    data_vae: str = flag(None, "VAE that made latents without a manifest", str)
    vae: str = flag(None, "VAE that decodes sample grids (name or folder); default: the one of the data", str)
    num_workers: int = flag(4, "threads that read latent files")

    batch_size: int = flag(256, "global batch size: samples per optimizer step over all processes and accumulation")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step and process")
    gradient_checkpointing: bool = flag(False, "recompute block activations in the backward pass to save memory")
    compile: bool = flag(False, "torch.compile the network; the first step takes minutes")
    max_train_steps: int = flag(400_000, "optimizer steps")
    epochs: int = flag(1400, "passes over the data; training ends at whichever of the two comes first")
    learning_rate: float = flag(1e-4, "constant learning rate of AdamW")
    adam_beta1: float = flag(0.9, "first moment decay")
    adam_beta2: float = flag(0.999, "second moment decay")
    adam_weight_decay: float = flag(0.0, "decoupled weight decay")
    adam_epsilon: float = flag(1e-8, "denominator offset")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    ema_decay: float = flag(0.9999, "decay of the exponential moving average of the weights")
    mixed_precision: str = flag(None, "autocast; default bf16 on GPU, no on CPU", str, choices=["no", "fp16", "bf16"])
    allow_tf32: bool = flag(True, "TF32 matrix products on GPUs that have them")
    seed: int = flag(0, "seed of everything random")

    max_bad_steps: int = flag(20, "steps without finite loss and gradients in a row that end the run")

    log_every: int = flag(100, "interval of log lines, in steps")
    checkpointing_steps: int = flag(200_000, "interval of checkpoints that stay, in steps; the last step is one")
    rolling_steps: int = flag(5_000, "interval of rolling checkpoints, in steps; 0 is never")
    keep_last: int = flag(2, "number of rolling checkpoints to keep")
    sampling_steps: int = flag(10_000, "interval of sample grids, in steps; 0 is never")
    resume: str = flag(
        "0",
        "checkpoint to go on from: latest, auto (latest, or a fresh start where there is none), a step (0 is a fresh "
        "start) or a file, also of another run",
        also=["--resume-step"],
    )

    def model_flags(self):
        """Constructor arguments of the model that flags give; None: as the preset says."""
        return {
            "depth": self.trans_depth,
            "df_idxs": self.df_idxs,
            "qk_norm": self.qk_norm,
            "legacy_scaling": self.legacy_scaling,
            "encoder_depth": self.encoder_depth,
        }

    def branch_weights(self, num_branches):
        """β of each branch: as given, else 0.2 … 0.2 1.0. Raises InputError when the count does not fit."""
        weights = list(self.scale_weight or [0.2] * (num_branches - 1) + [1.0])
        if not all(map(math.isfinite, weights)):
            raise InputError(f"--scale-weight {weights} must be finite")
        if len(weights) != num_branches:
            raise InputError(
                f"--scale-weight has {len(weights)} values for {num_branches} branches; give one per branch"
            )
        return weights

    def check(self):
        """Raise InputError for a value out of range, naming the flag."""
        positive = ("batch_size", "gradient_accumulation_steps", "max_train_steps", "epochs", "learning_rate")
        positive += ("max_grad_norm", "adam_epsilon", "log_every", "checkpointing_steps")
        positive += ("keep_last", "max_bad_steps")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{shown(name)} {getattr(self, name)} must be greater than 0 and finite")
        for name in ("cfg_prob", "ema_decay", "tg_upper_bound", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{shown(name)} {getattr(self, name)} must lie between 0 and 1")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) == 1:
                raise InputError(f"{shown(name)} must be less than 1")
        for name in (
            "seed",
            "sampling_steps",
            "rolling_steps",
            "num_workers",
            "acc_coeff",
            "proj_coeff",
            "adam_weight_decay",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{shown(name)} {getattr(self, name)} must not be negative or infinite")
        if self.prediction != "v":
            raise InputError(f"--prediction {self.prediction} is unknown; the objective is defined for v")
        if not self.encoders() and (self.enc_ckpt or self.encoder_depth is not None):
            raise InputError("--enc-ckpt and --encoder-depth need --ssl-align and an --enc-type")

    def encoders(self):
        """{name: weights file, or None for the hub's} of the alignment encoders; empty without alignment."""
        names = parse_enc_type(self.enc_type)  # a misspelling is refused without --ssl-align too
        if not (names and self.ssl_align):
            return {}
        return dict(zip(names, parse_enc_ckpt(self.enc_ckpt, names), strict=True))

    def to_json(self):
        return json.dumps(dataclasses.asdict(self), indent=1)
