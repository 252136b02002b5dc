"""Speed of a training step, as ratios measured in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.train_step                               # CPU, fp32
    python -m benchmarks.train_step --model DeepFlow-XL/2 --batch-size 256           # GPU, bf16

Side by side: the model, SiT of equal width and depth (one branch), and diffusers' DiTTransformer2DModel of equal width
and depth, each eager and compiled, trained with the same optimizer, batch and precision. A step is forward pass, loss,
backward pass, clipping, AdamW and EMA; times are medians of interleaved repeats. MFU is taken of the rate of a large
matrix product measured in the same run; memory is the peak of one model's steps alone.
"""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.steps import PATH, BranchFlags, Step, begin, cells, make_batch, our_loss
from benchmarks.timing import ON_GPU, interleaved_medians, matmul_rate, peak_gpu_memory, print_table
from common.errors import exit_on_input_error
from loss import mean_square
from models import create_model, model_config


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
    """{(what, how): function that builds its Step}."""
    options = model_config(args.model, depth=args.trans_depth, df_idxs=args.df_idxs)
    batch = make_batch(options, args.batch_size)
    sit = {**options, "df_idxs": ()}
    builders = {
        args.model: (lambda: create_model(args.model, **options), our_loss),
        "SiT, equal width and depth": (lambda: create_model(args.model, **sit), our_loss),
        "diffusers DiT, equal width and depth": (lambda: diffusers_model(options), diffusers_loss),
    }
    return {
        (what, how): lambda build=build, loss=loss, how=how: Step(
            build(), loss, batch, args.autocast, how == "compiled"
        )
        for what, (build, loss) in builders.items()
        for how in args.hows
    }


def peak_memory(args, key):
    """Peak memory of one model's steps in MB: the GPU's, or on a CPU that of the process, imports included."""
    step = make_steps(args)[key]()
    step()
    if ON_GPU:
        return peak_gpu_memory(step)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kilobytes on Linux


def peak_memories(args):
    """{(what, how): MB}; on a CPU each in a process of its own."""
    keys = make_steps(args)
    if ON_GPU:
        return {key: peak_memory(args, key) for key in keys}
    memory = {}
    for key in keys:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            memory[key] = fresh.submit(peak_memory, args, key).result()
    return memory


def measure(args):
    """Rows of the table, and {(what, how): median seconds}."""
    rate = matmul_rate(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    print(f"large matrix product: {rate / 1e12:.2f} TFLOP/s", flush=True)
    memory = peak_memories(args)
    steps = {key: build() for key, build in make_steps(args).items()}
    medians = interleaved_medians(steps, args.repeats)
    rows = []
    for key, seconds in medians.items():
        mfu = 100 * steps[key].flops / seconds / rate
        rows.append([*key, *cells(steps[key], seconds, args.batch_size), f"{mfu:.1f}", f"{memory[key]:,.0f}"])
    return rows, medians


def print_ratios(medians, model):
    """The ratios that the table is for."""
    for how in dict.fromkeys(how for _, how in medians):
        ours, sit, theirs = (seconds for (_, h), seconds in medians.items() if h == how)
        print(
            f"{how}: SiT to diffusers' DiT {sit / theirs:.3f} of the time; {model} to SiT {ours / sit:.3f}", flush=True
        )


def main():
    args = begin(BranchFlags, __doc__)
    rows, medians = measure(args)
    print_table(["model", "", "ms/step", "images/s", "GFLOP/image", "MFU %", "peak MB"], rows)
    print_ratios(medians, args.model)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
