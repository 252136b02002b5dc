"""Speed of a training step, as ratios measured in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.train_step                    # CPU, fp32
    python -m benchmarks.train_step --model DeepFlow-XL/2                 # GPU, bf16
    python -m benchmarks.train_step --model DeepFlow-XL/2 --only model

Side by side: the model, SiT of equal width and depth (one branch), and diffusers' DiTTransformer2DModel of equal width
and depth, each eager and compiled, trained with the same optimizer, batch and precision. A step is forward pass, loss,
backward pass, clipping, AdamW and EMA; times are medians. Networks whose predicted memory fits on the GPU together
take turns, step by step; others are built, measured and freed one after the other, which is noted beside their ratio.
MFU is relative to the rate of a large matrix product in the same run; memory is the peak of one model's steps.
"""

import dataclasses
import functools
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.memory import fixed_bytes, largest_batch, saved_bytes
from benchmarks.steps import PATH, BranchFlags, Step, begin, cells, make_batch, our_loss
from benchmarks.timing import (
    DEVICE,
    ON_GPU,
    free,
    installed,
    interleaved_medians,
    matmul_rate,
    peak_gpu_memory,
    print_table,
)
from common.errors import exit_on_input_error
from common.flags import Range, flag
from loss import mean_square
from models import create_model, model_config

NETWORKS = ("model", "sit", "dit")


@dataclasses.dataclass(kw_only=True)
class TrainStepFlags(BranchFlags):
    """Flags of this program."""

    batch_size: int | None = flag(
        None if ON_GPU else 8,
        "images per step; default on a GPU: the largest of 256, 128, … that is predicted to fit",
        int,
        range=Range(low=1),
        group="optimisation",
    )
    only: list = flag(
        NETWORKS, "networks to measure", str, nargs="+", choices=NETWORKS, group="precision and speed", metavar="NAME"
    )

    def options(self):
        """Constructor arguments of the model."""
        return model_config(self.model, depth=self.trans_depth, df_idxs=self.df_idxs)

    def resolve(self):
        """A copy with a batch size."""
        size = self.batch_size or largest_batch(self.options(), gpu_bytes(), self.hows[0])
        return dataclasses.replace(self, batch_size=size)


def gpu_bytes():
    """Bytes of GPU memory."""
    return torch.cuda.get_device_properties(DEVICE).total_memory


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


def make_steps(args):
    """{(what, how): function that builds its Step}, without diffusers' if that is not installed."""
    options = args.options()
    batch = make_batch(options, args.batch_size)
    sit = {**options, "df_idxs": ()}
    builders = {
        "model": (args.model, lambda: create_model(args.model, **options), our_loss),
        "sit": ("SiT, equal width and depth", lambda: create_model(args.model, **sit), our_loss),
        "dit": ("diffusers DiT, equal width and depth", lambda: diffusers_model(options), diffusers_loss),
    }
    return {
        (what, how): functools.partial(build_step, build, loss, batch, args.autocast, how)
        for how in args.hows
        for name, (what, build, loss) in builders.items()
        if name in args.only and (name != "dit" or installed("diffusers"))
    }


def build_step(build, *rest):
    """The Step of the network that build() makes."""
    return Step(build(), *rest)


def groups(args, keys):
    """The keys (what, how) in lists of those that run together: on a GPU as many as are predicted to fit."""
    if not ON_GPU:
        return [list(keys)]
    options, found = args.options(), [[]]
    for what, how in keys:
        together = [*found[-1], (what, how)]
        states = len(together) * fixed_bytes(options)
        if found[-1] and states + max(saved_bytes(options, h) for _, h in together) * args.batch_size > gpu_bytes():
            found.append([])
        found[-1].append((what, how))
    return found


def peak_memory(args, key):
    """Peak memory in MB of the process while one model trains on a CPU, imports included."""
    make_steps(args)[key]()()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes on Linux


def build_and_weigh(args, key, build):
    """A Step, ready to run, and the peak memory of its steps in MB; on a CPU measured in a separate process."""
    if not ON_GPU:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            memory = fresh.submit(peak_memory, args, key).result()
        return build(), memory
    others = torch.cuda.memory_allocated(DEVICE) / 1e6
    step = build()
    step()
    return step, peak_gpu_memory(step) - others


def measure_group(args, keys, rate):
    """Rows of the table and {(what, how): median seconds} for networks that are held together."""
    builders, steps, rows, memory = make_steps(args), {}, [], {}
    for key in keys:
        try:
            steps[key], memory[key] = build_and_weigh(args, key, builders[key])
        except torch.OutOfMemoryError:
            rows.append([*key, "out of memory", *"––––"])
            free()
    medians = interleaved_medians(steps, args.repeats)
    for key, seconds in medians.items():
        mfu = 100 * steps[key].flops / seconds / rate
        rows.append([*key, *cells(steps[key], seconds, args.batch_size), f"{mfu:.1f}", f"{memory[key]:,.0f}"])
    return rows, medians


def measure(args):
    """Rows of the table and a list of {(what, how): median seconds}, one for each group."""
    rate = matmul_rate(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    print(f"large matrix product: {rate / 1e12:.2f} TFLOP/s", flush=True)
    if "dit" in args.only and not installed("diffusers"):
        print("diffusers is not installed: its row is left out", flush=True)
    rows, medians = [], []
    for keys in groups(args, make_steps(args)):
        more, times = measure_group(args, keys, rate)
        rows, medians = [*rows, *more], [*medians, times]
        free()
    return rows, medians


def print_ratios(groups, args):
    """The ratios that the table is for."""
    medians = {key: seconds for group in groups for key, seconds in group.items()}
    ours, sit, dit = args.model, "SiT, equal width and depth", "diffusers DiT, equal width and depth"
    for how in args.hows:
        for a, b in ((sit, dit), (ours, sit)):
            pair = (a, how), (b, how)
            if medians.keys() >= set(pair):
                together = any(group.keys() >= set(pair) for group in groups)
                note = "run in turns" if together else "one after the other: they do not fit together"
                print(
                    f"{how}: {a} takes {medians[pair[0]] / medians[pair[1]]:.3f} of the time of {b}; {note}", flush=True
                )


def main():
    args = begin(TrainStepFlags, __doc__)
    rows, medians = measure(args)
    print_table(["model", "", "ms/step", "images/s", "GFLOP/image", "MFU %", "peak MB"], rows)
    print_ratios(medians, args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
