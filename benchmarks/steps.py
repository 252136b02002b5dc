"""What the benchmarks of training steps share: flags, a batch, the loss, one step of training."""

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import DEVICE, ON_GPU, describe_machine
from common.flags import Range, flag, parse_flags
from common.precision import set_math
from loss import deepflow_loss
from models.compiling import compile_blocks
from models.paths import PATHS
from training.ema import EMA

PATH = PATHS["linear"]
SPEED = "precision and speed"  # group of flags


@dataclasses.dataclass(kw_only=True)
class StepFlags:
    """Flags of a benchmark of training steps; defaults depend on whether there is a GPU."""

    model: str = flag("DeepFlow-B/2" if ON_GPU else "DeepFlow-S/2", "a preset", group="model")
    batch_size: int = flag(256 if ON_GPU else 8, "images of a step", range=Range(low=1), group="optimisation")
    precision: str = flag(
        "bf16" if ON_GPU else "no", "autocast", choices=["bf16", "no"], also=["--mixed-precision"], group=SPEED
    )
    repeats: int = flag(20 if ON_GPU else 5, "interleaved; medians are printed", range=Range(low=1), group=SPEED)
    compile: bool = flag(True, "measure compiled too", group=SPEED)

    @property
    def hows(self):
        """The ways a network is run."""
        return ("eager", "compiled") if self.compile else ("eager",)

    def resolve(self):
        """A copy with machine-dependent defaults filled in."""
        return self

    def autocast(self):
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16")


@dataclasses.dataclass(kw_only=True)
class BranchFlags(StepFlags):
    """As StepFlags, with other branches than the preset's."""

    trans_depth: int | None = flag(None, "number of blocks; default: the preset's", int, group="model")
    df_idxs: str | None = flag(None, "blocks after which a branch ends; default: the preset's", str, group="model")


def begin(flags, description):
    """Parse the command line into `flags`, set the precision of products, and print what is measured where."""
    args = parse_flags(flags, description=description).resolve()
    set_math(allow_tf32=True)
    print(f"{args.model}, batch {args.batch_size}, precision {args.precision}, {describe_machine()}", flush=True)
    return args


def latent_shape(options, batch_size):
    """(N, C, H, W) of a model's latents."""
    return batch_size, options["in_channels"], options["input_size"], options["input_size"]


def make_batch(options, batch_size):
    """x0, noise (N, C, H, W), times (k, N), labels (N,)."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *latent_shape(options, batch_size), generator=g).to(DEVICE)
    times = torch.rand(len(options["df_idxs"]) + 1, batch_size, generator=g).to(DEVICE)
    labels = torch.randint(options["num_classes"], (batch_size,), generator=g).to(DEVICE)
    return x0, noise, times, labels


def our_loss(model, x0, noise, times, y):
    """Loss of a DeepFlow model, a scalar; times (k, N) of as many branches as it has, or more."""
    k = getattr(model, "module", model).num_branches  # in DistributedDataParallel it is the module's
    times = times[:k]
    out = model(PATH.interpolate(x0, noise, times[0]), list(times), y)
    weights = [0.2] * (k - 1) + [1.0]
    return deepflow_loss(out, x0, noise, times, PATH, weights, 1.0).total.mean()


class Step:
    """One training step of a model: forward, loss, backward, clipping, AdamW, EMA."""

    def __init__(self, model, loss, batch, autocast, how, wrap=None):
        """how: eager, compiled (by block, as in train*.py) or whole graph; wrap: such as DistributedDataParallel."""
        self.model, self.loss, self.batch, self.autocast = model.to(DEVICE).train(), loss, batch, autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        self.network = model if wrap is None else wrap(model)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.ema = EMA(model, 0.9999)
        self.flops = self.count_flops()
        if how == "compiled" and hasattr(model, "blocks"):
            compile_blocks(model)
        elif how != "eager":
            model.compile(fullgraph=True)

    def gradient(self):
        with self.autocast():
            loss = self.loss(self.network, *self.batch)
        loss.backward()

    def count_flops(self):
        """FLOPs of forward and backward pass, a multiply-add being two."""
        with FlopCounterMode(display=False) as counter:
            self.gradient()
        self.optimizer.zero_grad()
        return counter.get_total_flops()

    def __call__(self):
        self.gradient()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


def cells(step, seconds, batch_size):
    """ms/step, images/s and GFLOP/image of a step of so many seconds."""
    gflop = step.flops / batch_size / 1e9
    return f"{seconds * 1e3:.1f}", f"{batch_size / seconds:.2f}", f"{gflop:.1f}"
