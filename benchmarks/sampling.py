"""Speed of sampling: SiT and DeepFlow beside diffusers' DiT of equal size, all driven by this project's sampler loop.

    python -m benchmarks.sampling                      # S/2 on a CPU; XL/2 and B/2, compiled bf16, on a GPU
    python -m benchmarks.sampling --sizes B --batch-size 8 --steps 10 --no-compile
    python -m benchmarks.sampling --branches           # what guidance and exits from DeepFlow's branches cost instead

Every row is a median over interleaved repeats of a whole run of `--steps` SDE steps with per-image noise; decoding is
not part of it. "Overhead" is what that run costs beyond as many calls of the bare network. Ratios are medians over the
repeats, of runs that follow each other.
"""

import dataclasses

import torch

from benchmarks.timing import (
    DEVICE,
    ON_GPU,
    describe_machine,
    installed,
    interleaved_times,
    median_ratio,
    medians_of,
    print_table,
)
from benchmarks.train_step import diffusers_model
from common.errors import exit_on_input_error
from common.flags import Range, flag, parse_flags
from common.precision import DTYPES, set_math
from models import create_model, model_config
from models.compiling import compile_blocks
from models.paths import PATHS
from samplers import SAMPLERS, BranchOptions, BranchVelocity, Guidance, GuidedVelocity, InternalGuidance, integrate
from sampling.sampler import batch_noise

CLASSES = 1000
GUIDANCES = {"none": Guidance(), "all steps": Guidance(1.5), "[0.3, 0.7]": Guidance(1.5, 0.3, 0.7)}
IMAGES_PER_S = {"XL": 7.8, "B": 26.0}  # target on one H200: compiled bf16, 250 steps, no guidance
SDE = SAMPLERS["sde"]
NONE, CFG = GUIDANCES["none"], GUIDANCES["all steps"]
BRANCHES = {  # what: classifier-free guidance, options, and {k: the most time, in unguided runs}
    "internal guidance": (NONE, BranchOptions(InternalGuidance(1.5)), {2: 1.03, 3: 1.03}),
    "classifier-free guidance": (CFG, BranchOptions(), {2: 2.1, 3: 2.1}),
    "the same, unconditional half up to branch 1": (CFG, BranchOptions(cfg_exit=1), {2: 1.6, 3: 1.45}),
    "exit after branch 1": (NONE, BranchOptions(exit_branch=1), {2: 0.55}),
}


@dataclasses.dataclass(kw_only=True)
class BenchmarkFlags:
    """Flags of this program; defaults depend on whether there is a GPU."""

    sizes: tuple = flag(
        ("XL", "B") if ON_GPU else ("S",), "of the models", str, nargs="+", choices=["S", "B", "L", "XL"], group="model"
    )
    latent_size: int = flag(32, "side of the latents", range=Range(low=1), group="model")
    batch_size: int = flag(64 if ON_GPU else 4, "images of a run", range=Range(low=1), group="sampling")
    steps: int = flag(25 if ON_GPU else 10, "SDE steps of a run", range=Range(low=1), group="sampling")
    dtype: str = flag(
        "bf16" if ON_GPU else "fp32", "precision of the network", choices=list(DTYPES), group="precision and speed"
    )
    repeats: int = flag(5, "interleaved; medians are printed", range=Range(low=1), group="precision and speed")
    compile: bool = flag(True, "measure compiled too", group="precision and speed")
    branches: bool = flag(False, "measure guidance and exits from the branches, eager, instead", group="sampling")


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


def build_networks(size, args, compiled):
    """{name: (x, t, y) → velocity} of SiT, DeepFlow and, if installed, diffusers' DiT of SiT's width and depth."""
    names = (f"SiT-{size}/2", f"DeepFlow-{size}/2")
    models = [create_model(name, input_size=args.latent_size) for name in names]
    if installed("diffusers"):
        models.append(diffusers_model(model_config(names[0], input_size=args.latent_size)))
    for model in models:
        model.to(DEVICE, DTYPES[args.dtype]).eval().requires_grad_(False)
    sit, deepflow, *dit = models
    if compiled:
        compile_blocks(sit)
        compile_blocks(deepflow)
    for model in dit if compiled else []:
        model.compile(dynamic=False)
    networks = {names[0]: sit.velocity, names[1]: deepflow.velocity}
    if dit:
        networks[f"diffusers DiT-{size}/2"] = lambda x, t, y: dit[0](x, timestep=1000 * t, class_labels=y).sample
    return networks


def build_cases(size, args):
    """All rows of one size, and {(model, how): network}."""
    networks = {(name, "eager"): network for name, network in build_networks(size, args, False).items()}
    if args.compile:
        networks |= {(name, "compiled"): network for name, network in build_networks(size, args, True).items()}
    return [Case(*key, guidance, network) for key, network in networks.items() for guidance in GUIDANCES], networks


def sample(network, guidance, args, **branches):
    """One run of the sampler as generate.py drives it; branches: of a BranchVelocity."""
    shape, y = (4, args.latent_size, args.latent_size), torch.arange(args.batch_size, device=DEVICE) % CLASSES
    make = BranchVelocity if branches else GuidedVelocity
    velocity = make(network, y, torch.full_like(y, CLASSES), guidance, DTYPES[args.dtype], **branches)
    noise = batch_noise(0, [range(args.batch_size)], args.steps, shape, DEVICE)
    step = SDE.step(PATHS["linear"], lambda _: next(noise))
    integrate(step, velocity, next(noise), SDE.times(args.steps))


@torch.no_grad()
def call_bare(network, args):
    """As many calls of the network as an unguided run makes, and nothing else."""
    x = torch.randn(args.batch_size, 4, args.latent_size, args.latent_size, device=DEVICE).to(DTYPES[args.dtype])
    y, t = torch.arange(args.batch_size, device=DEVICE) % CLASSES, torch.full((args.batch_size,), 0.5, device=DEVICE)
    for _ in range(args.steps):
        network(x, t, y)


def measure(cases, args):
    """{key: seconds of every repeat} of every row, of the bare networks, and of "free": a network that costs nothing.

    Runs that are compared follow each other.
    """
    x = torch.zeros(args.batch_size, 4, args.latent_size, args.latent_size, device=DEVICE, dtype=DTYPES[args.dtype])
    runs = {"free": lambda: sample(lambda *_: x, GUIDANCES["none"], args)}
    for case in sorted(cases, key=lambda case: (case.how, list(GUIDANCES).index(case.guidance))):
        if case.guidance == "none":
            runs["bare", case.key[:2]] = lambda c=case: call_bare(c.network, args)
        runs[case.key] = lambda c=case: sample(c.network, GUIDANCES[c.guidance], args)
    return interleaved_times(runs, args.repeats)


def images_per_second(median, args):
    """At 250 steps."""
    return args.batch_size / median * args.steps / SDE.num_steps


def row(case, times, medians, dit, args):
    """Cells of a case; dit: the name of diffusers' model."""
    median = medians[case.key]
    to_none = median_ratio(times, case.key, (case.model, case.how, "none"))
    theirs = dit, case.how, case.guidance
    to_dit = f"{median_ratio(times, case.key, theirs):.2f}" if theirs in times else "not installed"
    speed = f"{median / args.batch_size:.4f}", f"{images_per_second(median, args):.2f}"
    return *case.key, *speed, f"{to_none:.2f}", to_dit


def targets(size, networks, times, medians, args):
    """Yield (what, measured, reached) for the networks of this project."""
    dit = f"diffusers DiT-{size}/2"
    for model, how in (key for key in networks if key[0] != dit):
        name, none = f"{model}, {how}", (model, how, "none")
        guided, interval = (median_ratio(times, (model, how, g), none) for g in ("all steps", "[0.3, 0.7]"))
        overhead = 100 * (median_ratio(times, none, ("bare", (model, how))) - 1)
        yield f"{name}: guided run at most 2.1 unguided ones", f"{guided:.2f}", guided <= 2.1
        yield f"{name}: with interval [0.3, 0.7] at most 1.45", f"{interval:.2f}", interval <= 1.45
        yield f"{name}: overhead under 2 %", f"{overhead:.2f} %", overhead < 2
        if model.startswith("SiT") and (dit, how) in networks:  # DeepFlow of this size has VeRA besides the blocks
            to_dit = median_ratio(times, none, (dit, how, "none"))
            yield f"{name}: time per image at most diffusers'", f"{to_dit:.3f}", to_dit <= 1
        elif model.startswith("DeepFlow") and ON_GPU and how == "compiled" and size in IMAGES_PER_S:
            rate, least = images_per_second(medians[none], args), IMAGES_PER_S[size]
            yield f"{name}: at least {least} images/s at 250 steps", f"{rate:.2f}", rate >= least


def benchmark(size, args):
    """Measure one size and print its two tables."""
    torch.compiler.reset()  # a function is compiled for a few shapes and models at most
    cases, networks = build_cases(size, args)
    times = measure(cases, args)
    medians = medians_of(times)
    print(f"\n## {size}/2, batch {args.batch_size}, {args.dtype}, {args.steps} steps, {args.repeats} repeats\n")
    header = ["network", "", "guidance", "s/image", "images/s at 250 steps", "to none", "to diffusers"]
    print_table(header, [row(case, times, medians, f"diffusers DiT-{size}/2", args) for case in cases])
    free = medians["free"] / args.steps * 1e3
    print(f"\nSampler loop round a network that costs nothing: {free:.3f} ms per step.\n")
    rows = targets(size, networks, times, medians, args)
    print_table(["target", "measured", "reached"], [(*cells, "yes" if reached else "no") for *cells, reached in rows])


def benchmark_branches(size, args):
    """Print what sampling from 2 and 3 branches costs, in unguided runs of the same model."""
    name, rows = f"DeepFlow-{size}/2", []
    for k in (2, 3):
        depth = model_config(name)["depth"]
        key_layers = tuple(depth * branch // k for branch in range(1, k))
        model = create_model(name, input_size=args.latent_size, df_idxs=key_layers)
        model.to(DEVICE, DTYPES[args.dtype]).eval().requires_grad_(False)
        runs = {"unguided": lambda m=model: sample(m.velocity, NONE, args)}
        for what, (guidance, options, _) in BRANCHES.items():
            runs[what] = lambda m=model, g=guidance, o=options: sample(m.velocities, g, args, options=o, ends=m.ends)
        times = interleaved_times(runs, args.repeats)
        for what, (*_, most) in BRANCHES.items():
            ratio = median_ratio(times, what, "unguided")
            reached = ("yes" if ratio <= most[k] else "no") if k in most else ""
            rows.append((k, what, f"{ratio:.3f}", most.get(k, ""), reached))
    print(f"\n## {name}, batch {args.batch_size}, {args.dtype}, {args.steps} steps, {args.repeats} repeats\n")
    print_table(["branches", "", "unguided runs", "at most", "reached"], rows)


def main():
    args = parse_flags(BenchmarkFlags, description=__doc__)
    print(describe_machine())
    set_math(allow_tf32=True)
    for size in args.sizes:
        (benchmark_branches if args.branches else benchmark)(size, args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
