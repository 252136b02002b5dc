"""Speed of a training step, as ratios measured in one run.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py                               # CPU, fp32
    python benchmarks/train_step.py --model DeepFlow-XL/2 --batch-size 256           # GPU, bf16

Side by side: the model, SiT of equal width and depth (one branch), and diffusers' DiTTransformer2DModel of equal width
and depth, each eager and compiled, trained with the same optimizer, batch and precision. A step is forward pass, loss,
backward pass, clipping, AdamW and EMA; times are medians of interleaved repeats. MFU is taken of the rate of a large
matrix product measured in the same run; memory is the peak of one model's steps alone.
"""

import argparse
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import describe_machine, interleaved_medians, matmul_rate, print_table
from common.errors import exit_on_input_error
from common.precision import set_math
from loss import deepflow_loss, mean_square
from models import create_model, model_config
from models.paths import PATHS
from training.ema import EMA

PATH = PATHS["linear"]


def make_batch(options, batch_size, num_branches, device):
    """x0, noise (N, C, H, W), times (k, N), labels (N,)."""
    g = torch.Generator().manual_seed(0)
    shape = (batch_size, options["in_channels"], options["input_size"], options["input_size"])
    x0, noise = torch.randn(2, *shape, generator=g).to(device)
    times = torch.rand(num_branches, batch_size, generator=g).to(device)
    labels = torch.randint(options["num_classes"], (batch_size,), generator=g).to(device)
    return x0, noise, times, labels


def our_loss(model, x0, noise, times, labels):
    times = times[: model.num_branches]
    out = model(PATH.interpolate(x0, noise, times[0]), list(times), labels)
    weights = [0.2] * (model.num_branches - 1) + [1.0]
    return deepflow_loss(out, x0, noise, times, PATH, weights, 1.0).total.mean()


def diffusers_loss(model, x0, noise, times, labels):
    x = PATH.interpolate(x0, noise, times[0])
    velocity = model(x, timestep=times[0], class_labels=labels).sample
    return mean_square(velocity.float() - PATH.velocity(x0, noise, times[0])).mean()


def diffusers_model(options):
    """DiTTransformer2DModel of the same width, depth and heads."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=options["num_heads"],
        attention_head_dim=options["hidden_size"] // options["num_heads"],
        in_channels=options["in_channels"],
        out_channels=options["in_channels"],
        num_layers=options["depth"],
        sample_size=options["input_size"],
        patch_size=options["patch_size"],
        num_embeds_ada_norm=options["num_classes"],
    )


class Step:
    """One training step of a model: forward, loss, backward, clipping, AdamW, EMA."""

    def __init__(self, model, loss, batch, device, precision, compiled):
        self.model, self.loss, self.batch = model.to(device).train(), loss, batch
        self.precision, self.device = precision, device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        self.ema = EMA(model, 0.9999)
        self.flops = self.count_flops()
        if compiled:
            self.model.compile(fullgraph=True)

    def gradient(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(self.model, *self.batch)
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


def make_steps(args, device):
    """{(what, how): function that builds its Step}."""
    options = model_config(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    batch = make_batch(options, args.batch_size, len(options["df_idxs"]) + 1, device)
    sit = {**options, "df_idxs": ()}
    builders = {
        args.model: (lambda: create_model(args.model, **options), our_loss),
        "SiT, equal width and depth": (lambda: create_model(args.model, **sit), our_loss),
        "diffusers DiT, equal width and depth": (lambda: diffusers_model(options), diffusers_loss),
    }
    hows = ("eager", "compiled") if args.compile else ("eager",)
    return {
        (what, how): lambda build=build, loss=loss, how=how: Step(
            build(), loss, batch, device, args.precision, how == "compiled"
        )
        for what, (build, loss) in builders.items()
        for how in hows
    }


def peak_memory(args, device, key):
    """Peak memory of one model's steps in MB: the GPU's, or on a CPU that of the process, imports included."""
    step = make_steps(args, device)[key]()
    step()
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes on Linux
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 1e6


def peak_memories(args, device):
    """{(what, how): MB}; on a CPU each in a process of its own."""
    keys = make_steps(args, device)
    if device.type == "cuda":
        return {key: peak_memory(args, device, key) for key in keys}
    memory = {}
    for key in keys:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            memory[key] = fresh.submit(peak_memory, args, device, key).result()
    return memory


def measure(args, device):
    """Rows of the table, and {(what, how): median seconds}."""
    rate = matmul_rate(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    print(f"large matrix product: {rate / 1e12:.2f} TFLOP/s", flush=True)
    memory = peak_memories(args, device)
    steps = {key: build() for key, build in make_steps(args, device).items()}
    medians = interleaved_medians(steps, args.repeats, device)
    rows = []
    for key, seconds in medians.items():
        flops = steps[key].flops
        rows.append(
            [
                *key,
                f"{seconds * 1e3:.1f}",
                f"{args.batch_size / seconds:.2f}",
                f"{flops / args.batch_size / 1e9:.1f}",
                f"{100 * flops / seconds / rate:.1f}",
                f"{memory[key]:,.0f}",
            ]
        )
    return rows, medians


def print_ratios(medians, model):
    """The ratios that the table is for."""
    for how in dict.fromkeys(how for _, how in medians):
        ours, sit, theirs = (seconds for (_, h), seconds in medians.items() if h == how)
        print(
            f"{how}: SiT to diffusers' DiT {sit / theirs:.3f} of the time; {model} to SiT {ours / sit:.3f}", flush=True
        )


def add_step_flags(parser):
    """Flags of a benchmark of training steps, beside --model."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--trans-depth", type=int, help="another depth than the preset's")
    parser.add_argument("--df-idxs", help="other key layers than the preset's")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16" if on_gpu else "no")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="interleaved; medians are printed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled too")


def parse():
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DeepFlow-B/2" if on_gpu else "DeepFlow-S/2", help="a preset")
    add_step_flags(parser)
    return parser.parse_args()


def main():
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_math(allow_tf32=True)
    print(f"{args.model}, batch {args.batch_size}, precision {args.precision}, {describe_machine(device)}", flush=True)
    rows, medians = measure(args, device)
    header = ["model", "", "ms/step", "images/s", "GFLOP/image", "MFU %", "peak MB"]
    print_table(header, rows)
    print_ratios(medians, args.model)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
