"""The items of gpu_session.py: generator functions of Sizes that yield one Measured after the other."""

import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import dmf_step, sampling
from benchmarks.memory import largest_batch, step_bytes
from benchmarks.steps import Step, StepFlags, make_batch, our_loss
from benchmarks.timing import (
    DEVICE,
    ON_GPU,
    free,
    interleaved_times,
    matmul_rate,
    median_ratio,
    medians_of,
    peak_gpu_memory,
    seconds_of,
)
from common.flags import ROOT
from common.precision import DTYPES
from common.versions import versions as package_versions
from models import create_model, model_config
from models.codec import LatentCodec
from models.compiling import compile_blocks
from models.specs import LatentSpec
from training.logs import parse_line

# What one H200 is expected to do, compiled bf16; see docs/benchmarks.md.
STEP_RATE = {("xl", 256): 590.0, ("xl", 32): 470.0, ("b", 256): 2000.0}  # images/s of training
SDE_RATE = {("xl", "none"): 7.8}  # images/s at 250 steps
GUIDED_TO_NONE, MAP_TO_FLOW = 2.0, 3.6  # times, at most
COPY_RATE, PRODUCT_RATE = 3700.0, 790.0  # GB/s read and written, TFLOP/s
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a session runs."""

    xl: str
    b: str
    map: str
    batches: tuple  # images of a training step of xl
    batch: int  # of the other training steps
    repeats: int
    samples: int  # images of a sampler's run
    sde_steps: int
    train_steps: int
    images: int  # that generate.py makes
    copied: int  # bytes
    vae_width: int

    def precision(self):
        return "bf16" if ON_GPU else "no"

    def flags(self, name, batch, cls=StepFlags):
        """Flags of a benchmark of training steps."""
        return cls(model=name, batch_size=batch, precision=self.precision(), repeats=self.repeats)


FULL = Sizes("DeepFlow-XL/2", "DeepFlow-B/2", "DMFT-B/2", (32, 64, 128, 256), 256, 10, 64, 25, 200, 128, 2**32, 128)
TINY = Sizes("DeepFlow-Ti/2", "DeepFlow-Ti/2", "DMFT-Ti/2", (1, 2), 2, 1, 2, 2, 2, 2, 2**20, 8)


@dataclasses.dataclass
class Measured:
    """A measured number or text, and its prediction."""

    what: str
    value: float | str
    unit: str = ""
    predicted: float | None = None

    def ratio(self):
        """Measured over predicted; None without a prediction or a number."""
        return self.value / self.predicted if self.predicted and isinstance(self.value, float) else None


# Phase 1


def versions(_sizes):
    names = ("torch", "triton", "accelerate", "diffusers", "timm", "numpy")
    yield Measured("packages", ", ".join(f"{name} {text}" for name, text in package_versions(*names).items()))
    yield Measured("CUDA", str(torch.version.cuda))
    if ON_GPU:
        yield Measured("memory", torch.cuda.get_device_properties(DEVICE).total_memory / 1e9, "GB")


def gpu_tests(_sizes):
    yield Measured(
        "pytest -m gpu", run_program("-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py").splitlines()[-1]
    )


def rates(sizes):
    a = torch.zeros(sizes.copied, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    seconds = min(seconds_of(lambda: b.copy_(a)) for _ in range(5))
    yield Measured("copy, read and written", 2 * sizes.copied / seconds / 1e9, "GB/s", COPY_RATE)
    yield Measured(f"matrix product, {DTYPE}", matmul_rate(DTYPE) / 1e12, "TFLOP/s", PRODUCT_RATE)


def attention_kernels(sizes):
    """Forward and backward of XL's attention, 256 tokens, by kernel."""
    for width in (64, 72):
        shape = (max(1, sizes.batch // 2), 16, 256, width)
        q, k, v, gradient = torch.randn(4, *shape, dtype=DTYPE, device=DEVICE)
        q, k, v = (part.clone().requires_grad_() for part in (q, k, v))
        flop = 3.5 * 4 * q.numel() * 256  # the backward pass has 2.5 times as many products
        for name, backend in BACKENDS.items():
            what = f"head size {width}, {name}, forward and backward"

            def run(inputs=(q, k, v), gradient=gradient, backend=backend):
                with sdpa_kernel(backend):
                    torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)

            try:
                run()
                seconds = min(seconds_of(run) for _ in range(sizes.repeats))
                yield Measured(what, flop / seconds / 1e12, "TFLOP/s")
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                yield Measured(what, "not available")


# Phases 2 and 3


def make_step(sizes, name, batch, how, wrap=None):
    """(Step of a preset, seconds until it has run once)."""
    args, start = sizes.flags(name, batch), time.perf_counter()
    step = Step(create_model(name), our_loss, make_batch(model_config(name), batch), args.autocast, how, wrap)
    step()
    return step, time.perf_counter() - start


def step_rows(sizes, name, batch, how, label, wrap=None):
    """Speed, start-up and memory of a training step."""
    what = f"{name}, {batch} images, {label}"
    try:
        step, start = make_step(sizes, name, batch, how, wrap)
    except torch.OutOfMemoryError:
        yield Measured(what, "out of memory")
        return
    seconds = statistics.median(interleaved_times({"step": step}, sizes.repeats)["step"])
    size = "xl" if name == sizes.xl else "b"
    predicted = STEP_RATE.get((size, batch)) if how != "eager" else None
    yield Measured(what, batch / seconds, "images/s", predicted)
    yield Measured(f"{what}: built and run once", start, "s")
    if ON_GPU:
        memory = step_bytes(model_config(name), batch, "eager" if how == "eager" else "compiled")
        yield Measured(f"{what}: peak memory", peak_gpu_memory(step) / 1e3, "GB", memory / 1e9)


def xl_steps(sizes, how):
    for batch in sizes.batches:
        yield from step_rows(sizes, sizes.xl, batch, how, how)
        free()


def eager_steps(sizes):
    yield from xl_steps(sizes, "eager")


def compiled_steps(sizes):
    yield from xl_steps(sizes, "compiled")


def top_kernels(sizes, count=12):
    """The kernels that take the most time of a compiled step, and their shares."""
    step, _ = make_step(sizes, sizes.xl, sizes.batches[0], "compiled")
    activities = [torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        seconds_of(step)
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:count]:
        what = f"{event.key[:70]}, {event.count} times"
        yield Measured(what, 100 * getattr(event, key) / total, "% of a step")


def small_steps(sizes):
    for how in ("eager", "compiled"):
        yield from step_rows(sizes, sizes.b, sizes.batch, how, how)
        free()


def whole_graph(sizes):
    yield from step_rows(sizes, sizes.b, sizes.batch, "whole graph", "whole graph instead of blocks")


def data_parallel(sizes):
    """DistributedDataParallel with one process, set up as training does it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)
    try:
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False, "bucket_cap_mb": 250}
        wrap = functools.partial(torch.nn.parallel.DistributedDataParallel, **options)
        yield from step_rows(sizes, sizes.b, sizes.batch, "compiled", "compiled, data parallel, one process", wrap)
    finally:
        torch.distributed.destroy_process_group()


def flow_map_parts(sizes):
    bench = dmf_step.Bench(sizes.flags(sizes.map, max(1, sizes.batch // 4), dmf_step.FlowMapStepFlags), compiled=True)
    times = interleaved_times(bench.parts(), sizes.repeats)
    for name, seconds in medians_of(times).items():
        predicted = MAP_TO_FLOW if name == "flow map step" else None
        yield Measured(f"{name.strip()}: time", 1e3 * seconds, "ms")
        yield Measured(f"{name.strip()}: to a flow step", median_ratio(times, name, "flow step"), "times", predicted)


# Phase 4


def sampling_rates(sizes):
    """SDE runs of XL and B, without and with guidance."""
    dtype = "bf16" if ON_GPU else "fp32"
    args = sampling.BenchmarkFlags(batch_size=sizes.samples, steps=sizes.sde_steps, dtype=dtype)
    for size, name in {"xl": sizes.xl, "b": sizes.b}.items():
        model = create_model(name).to(DEVICE, DTYPES[dtype]).eval().requires_grad_(False)
        compile_blocks(model)
        guidances = {key: sampling.GUIDANCES[key] for key in ("none", "all steps")}
        runs = {key: functools.partial(sampling.sample, model.velocity, g, args) for key, g in guidances.items()}
        times = interleaved_times(runs, min(3, sizes.repeats))
        for key, seconds in medians_of(times).items():
            rate = sampling.images_per_second(seconds, args)
            yield Measured(f"{name}, guidance {key}, at 250 steps", rate, "images/s", SDE_RATE.get((size, key)))
        yield Measured(f"{name}, guided to plain", median_ratio(times, "all steps", "none"), "times", GUIDED_TO_NONE)
        free()


def vae_folder(folder, width):
    """Write a VAE of Stable Diffusion's architecture with random weights; the folder's name marks it as that family."""
    from diffusers import AutoencoderKL

    widths = (width, 2 * width, 4 * width, 4 * width)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = {"down_block_types": down, "up_block_types": up, "block_out_channels": widths, "layers_per_block": 2}
    AutoencoderKL(**shape, norm_num_groups=min(32, width), scaling_factor=LatentSpec().scale).save_pretrained(folder)
    return folder


def decoding(sizes):
    with tempfile.TemporaryDirectory() as work:
        folder = vae_folder(Path(work) / "sd-vae-ft-ema", sizes.vae_width)
        for name in ("fp32", "bf16") if ON_GPU else ("fp32",):
            codec = LatentCodec.load(folder, DEVICE, DTYPES[name])
            latents = torch.randn(sizes.samples, 4, 32, 32, device=DEVICE)
            codec.decode(latents)
            seconds = min(seconds_of(lambda codec=codec, latents=latents: codec.decode(latents)) for _ in range(3))
            yield Measured(f"decoding to 256², {name}", 1e3 * seconds / sizes.samples, "ms/image")


def programs(sizes):
    """train.py with a checkpoint at its end, and generate.py from it."""
    from benchmarks.data import write_latents

    batch = largest_batch(model_config(sizes.xl), 1e9 * memory_gb(), "compiled") if ON_GPU else sizes.batch
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        write_latents(work / "latents", 8 * batch)
        start = time.perf_counter()
        line = ("--data-dir", work / "latents", "--data-vae", "ema", "--num-classes", 1000, "--model", sizes.xl)
        line += ("--batch-size", batch, "--max-train-steps", sizes.train_steps, "--sampling-steps", 0)
        line += ("--log-every", max(1, sizes.train_steps // 10), "--output-dir", work, "--exp-name", "run")
        run_program("train.py", *line, "--mixed-precision", sizes.precision(), *compiled())
        seconds, log = time.perf_counter() - start, work / "run/log.jsonl"
        records = [parse_line(text, log) for text in log.read_text().splitlines()]
        rate = statistics.median(record["images_per_s"] for record in records[len(records) // 2 :])
        predicted = STEP_RATE.get(("xl", batch))
        yield Measured(f"train.py, {sizes.xl}, {batch} images, later half of the steps", rate, "images/s", predicted)
        yield Measured(f"train.py, {sizes.train_steps} steps, start and checkpoint included", seconds, "s")
        vae, start = vae_folder(work / "sd-vae-ft-ema", sizes.vae_width), time.perf_counter()
        line = ("--ckpt", work / f"run/checkpoints/{sizes.train_steps:07d}.pt", "--vae", vae, "--sample-dir", work)
        line += ("--num-fid-samples", sizes.images, "--num-steps", 10 * sizes.sde_steps)
        dtype = "bf16" if ON_GPU else "fp32"
        run_program("generate.py", *line, "--dtype", dtype, "--vae-dtype", dtype, *compiled())
        what = f"generate.py, {sizes.images} images, {10 * sizes.sde_steps} SDE steps, start included"
        yield Measured(what, time.perf_counter() - start, "s")


def memory_gb():
    """Memory of the GPU, GB."""
    return torch.cuda.get_device_properties(DEVICE).total_memory / 1e9


def compiled():
    """The flag that makes a program compile, on a GPU."""
    return ("--compile",) if ON_GPU else ("--no-compile",)


def run_program(*command):
    """Standard output of a Python program of the repository. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout.strip()
