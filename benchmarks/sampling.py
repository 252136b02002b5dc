"""Speed of sampling: SiT and DeepFlow beside diffusers' DiT of equal size, all driven by this project's sampler loop.

    python benchmarks/sampling.py                      # S/2 on a CPU; XL/2 and B/2, compiled bf16, on a GPU
    python benchmarks/sampling.py --sizes B --batch-size 8 --steps 10 --no-compile

Every row is a median over interleaved repeats of a whole run of `--steps` SDE steps with per-image noise; decoding is
not part of it. "Overhead" is what that run costs beyond as many calls of the bare network.
"""

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import DiTTransformer2DModel

from generate import DTYPES, BatchNoise
from models import PRESETS, create_model
from models.errors import InputError, exit_on_input_error
from models.paths import PATHS
from samplers import Guidance, GuidedVelocity, sample_sde
from training.distributed import set_math

CLASSES = 1000
GUIDANCES = {"none": Guidance(), "all steps": Guidance(1.5), "[0.3, 0.7]": Guidance(1.5, 0.3, 0.7)}
IMAGES_PER_S = {"XL": 6.5, "B": 26.0}  # to reach on one H200: compiled bf16, 250 steps, no guidance
PAPER_STEPS = 250


@dataclasses.dataclass
class Case:
    """One row: a network, how it runs, and its guidance."""

    model: str
    how: str  # eager or compiled
    guidance: str
    network: object

    @property
    def key(self):
        return self.model, self.how, self.guidance


def diffusers_dit(preset, size):
    """(x, t, y) → velocity by diffusers' DiT of a preset's depth, width, heads and patch size, and the model itself."""
    model = DiTTransformer2DModel(
        num_attention_heads=preset.num_heads,
        attention_head_dim=preset.hidden_size // preset.num_heads,
        in_channels=4,
        num_layers=preset.depth,
        sample_size=size,
        patch_size=preset.patch_size,
        num_embeds_ada_norm=CLASSES,
    )
    return model, lambda x, t, y: model(x, timestep=1000 * t, class_labels=y).sample


def build_networks(size, args, device):
    """{name: (x, t, y) → velocity} of SiT, DeepFlow and diffusers' DiT, the last of SiT's depth and width."""
    if f"SiT-{size}/2" not in PRESETS:
        raise InputError(f"--sizes {size} is not one of S, B, L, XL")
    ours = {n: create_model(n, input_size=args.latent_size) for n in (f"SiT-{size}/2", f"DeepFlow-{size}/2")}
    dit, call = diffusers_dit(PRESETS[f"SiT-{size}/2"], args.latent_size)
    for model in (*ours.values(), dit):
        model.to(device, DTYPES[args.dtype]).eval().requires_grad_(False)
    return {**{name: model.velocity for name, model in ours.items()}, f"diffusers DiT-{size}/2": call}


def build_cases(size, args, device):
    """All rows of one size, and {(model, how): network}."""
    networks = {(name, "eager"): network for name, network in build_networks(size, args, device).items()}
    if args.compile:
        compiled = {(name, "compiled"): torch.compile(n, dynamic=False) for (name, _), n in networks.items()}
        networks.update(compiled)
    return [Case(*key, guidance, network) for key, network in networks.items() for guidance in GUIDANCES], networks


def sample(network, guidance, args, device):
    """One run of the sampler as generate.py drives it."""
    shape, y = (4, args.latent_size, args.latent_size), torch.arange(args.batch_size, device=device) % CLASSES
    velocity = GuidedVelocity(network, y, torch.full_like(y, CLASSES), guidance, DTYPES[args.dtype])
    noise = BatchNoise(0, [range(args.batch_size)], args.steps, shape, device)
    draw = noise.of(0)
    sample_sde(velocity, draw(0), PATHS["linear"], lambda step: draw(step + 1), args.steps)
    noise.close()


@torch.no_grad()
def call_bare(network, args, device):
    """As many calls of the network as an unguided run makes, and nothing else."""
    x = torch.randn(args.batch_size, 4, args.latent_size, args.latent_size, device=device).to(DTYPES[args.dtype])
    y, t = torch.arange(args.batch_size, device=device) % CLASSES, torch.full((args.batch_size,), 0.5, device=device)
    for _ in range(args.steps):
        network(x, t, y)


def seconds(run, device):
    """Wall time of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(cases, networks, args, device):
    """{key: seconds of every repeat} of every row, of the bare networks, and of "free": a network without cost."""
    x = torch.zeros(args.batch_size, 4, args.latent_size, args.latent_size, device=device, dtype=DTYPES[args.dtype])
    runs = {"free": lambda: sample(lambda *_: x, GUIDANCES["none"], args, device)}
    for key, network in networks.items():
        runs["bare", key] = lambda n=network: call_bare(n, args, device)
        for case in cases:
            if case.key[:2] == key:
                runs[case.key] = lambda c=case: sample(c.network, GUIDANCES[c.guidance], args, device)
    times = {key: [] for key in runs}
    for repeat in range(args.repeats + 1):  # the first is for compilation and caches
        for key, run in runs.items():
            elapsed = seconds(run, device)
            if repeat:
                times[key].append(elapsed)
    return times


def ratio(times, a, b):
    """Median of the ratios of two rows in the same repeat."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def images_per_second(times, key, args):
    """At 250 steps, from the median."""
    return args.batch_size / statistics.median(times[key]) * args.steps / PAPER_STEPS


def print_rows(size, cases, times, args):
    print("| network | | guidance | s/image | images/s at 250 steps | to none | to diffusers |")
    print("|---|---|---|---|---|---|---|")
    for model, how, guidance in (case.key for case in cases):
        key = model, how, guidance
        cells = [f"{statistics.median(times[key]) / args.batch_size:.4f}", f"{images_per_second(times, key, args):.2f}"]
        cells += [f"{ratio(times, key, (model, how, 'none')):.2f}"]
        cells += [f"{ratio(times, key, (f'diffusers DiT-{size}/2', how, guidance)):.2f}"]
        print(f"| {' | '.join([*key, *cells])} |")


def targets(size, cases, times, args, device):
    """[(what, measured, reached)] for the networks of this project."""
    rows = []
    for model, how in {case.key[:2]: None for case in cases if not case.model.startswith("diffusers")}:
        name, none = f"{model}, {how}", (model, how, "none")
        guided = ratio(times, (model, how, "all steps"), none)
        interval = ratio(times, (model, how, "[0.3, 0.7]"), none)
        overhead = 100 * (ratio(times, none, ("bare", (model, how))) - 1)
        rows.append((f"{name}: guided run at most 2.1 unguided ones", f"{guided:.2f}", guided <= 2.1))
        rows.append((f"{name}: with interval [0.3, 0.7] at most 1.45", f"{interval:.2f}", interval <= 1.45))
        rows.append((f"{name}: overhead under 2 %", f"{overhead:.2f} %", overhead < 2))
        if model.startswith("SiT"):  # DeepFlow of the same name has VeRA beside as many blocks
            to_dit = ratio(times, none, (f"diffusers DiT-{size}/2", how, "none"))
            rows.append((f"{name}: time per image at most diffusers'", f"{to_dit:.2f}", to_dit <= 1))
        elif device.type == "cuda" and how == "compiled" and size in IMAGES_PER_S:
            rate, least = images_per_second(times, none, args), IMAGES_PER_S[size]
            rows.append((f"{name}: at least {least} images/s", f"{rate:.2f}", rate >= least))
    return rows


def benchmark(size, args, device):
    """Measure one size and print its two tables."""
    cases, networks = build_cases(size, args, device)
    times = measure(cases, networks, args, device)
    print(f"\n## {size}/2, batch {args.batch_size}, {args.dtype}, {args.steps} steps, {args.repeats} repeats\n")
    print_rows(size, cases, times, args)
    free = statistics.median(times["free"]) / args.steps * 1e3
    print(f"\nSampler loop round a network that costs nothing: {free:.3f} ms per step.\n")
    print("| target | measured | reached |\n|---|---|---|")
    for what, measured, reached in targets(size, cases, times, args, device):
        print(f"| {what} | {measured} | {'yes' if reached else 'no'} |")


def parse_args(device):
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["XL", "B"] if on_gpu else ["S"], help="S, B, L, XL")
    parser.add_argument("--batch-size", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--steps", type=int, default=25 if on_gpu else 10, help="SDE steps of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also compiled")
    return parser.parse_args()


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = parse_args(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    set_math(allow_tf32=True)
    for size in args.sizes:
        benchmark(size, args, device)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
