"""Distance between what a model's branches end with and its final features, over all sampling steps (Figure 2d).

    python evaluations/feature_distance.py --ckpt CKPT --num-samples 64 --out results/distance.json --plot distance.png
    python evaluations/feature_distance.py --ckpt SIT_CKPT --block 6

For every branch but the last: its tokens before VeRA (v*) and after it, against the tokens after the last block. The
distance is Euclidean over the channels of a token, averaged over tokens and samples. A model of one branch (SiT) is
compared at --block. The paper states 7.7 for SiT, 7.2 with deep supervision and 2.9 for DeepFlow-2T (B, 250 SDE steps).
"""

import argparse
import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import torch
from tqdm import tqdm

from common.errors import InputError, exit_on_input_error
from common.files import check_writable, write_atomically
from common.flags import shown
from evaluations.metrics.results import write_result
from models import load_checkpoint
from models.paths import PATHS
from samplers import GuidedVelocity, sample_labels, sample_noise, sample_ode, sample_sde
from training.distributed import set_math

ROWS = 10  # of the printed table


class Probe:
    """The network as the sampler sees it, (x, t, y) → velocity; records every call's distances.

    sums: {feature: {t: [sum over samples, samples]}}, in the order in which they appear.
    """

    def __init__(self, model, block=None):
        self.model, self.block_output = model, None
        self.sums = collections.defaultdict(lambda: collections.defaultdict(lambda: [0.0, 0]))
        self.block = block
        if block is not None:
            model.blocks[block - 1].register_forward_hook(self.keep)

    def keep(self, _module, _inputs, output):
        self.block_output = output

    def __call__(self, x, t, y):
        *intermediate, final = self.model.run_branches(x, self.model.branch_times(t), y)
        for number, branch in enumerate(intermediate, 1):
            self.record(f"branch {number}, before VeRA", t, branch.v_star, final.v_star)
            self.record(f"branch {number}, after VeRA", t, branch.aligned, final.v_star)
        if self.block is not None:
            self.record(f"block {self.block}", t, self.block_output, final.v_star)
        return self.model.to_image(self.model.velocity_layer(final.v_star, final.condition))

    def record(self, name, t, features, final):
        """Add the distances of one call, (N, T, D) each; t (N,) is one time for all."""
        distances = (features - final).double().norm(dim=-1).mean(dim=1)
        entry = self.sums[name][round(float(t[0]), 9)]
        entry[0] += float(distances.sum())
        entry[1] += len(distances)

    def curves(self):
        """{feature: [(t, mean distance)]} from noise to data."""
        return {
            name: [(t, total / count) for t, (total, count) in sorted(times.items(), reverse=True)]
            for name, times in self.sums.items()
        }


def sample(args, checkpoint, probe, device):
    """Run the sampler on all samples, in batches; what it makes is thrown away."""
    options, path = checkpoint.options, PATHS[checkpoint.run.get("path_type") or "linear"]
    shape = (options["in_channels"], options["input_size"], options["input_size"])
    for start in tqdm(range(0, args.num_samples, args.batch_size), unit="batch", mininterval=1):
        indices = range(start, min(start + args.batch_size, args.num_samples))
        y = sample_labels(args.seed, indices, options["num_classes"]).to(device)
        velocity = GuidedVelocity(probe, y, torch.full_like(y, options["num_classes"]))
        x = sample_noise(args.seed, indices, 0, shape).to(device)
        if args.mode == "ode":
            x = sample_ode(velocity, x, args.num_steps)
        else:
            x = sample_sde(
                velocity,
                x,
                path,
                lambda step, who=indices: sample_noise(args.seed, who, step + 1, shape),
                args.num_steps,
            )
        if not x.isfinite().all():
            raise InputError(f"{args.ckpt} gives samples that are not finite (images {indices[0]}..{indices[-1]})")


def table(curves):
    """Markdown: the mean over all steps, then some of the steps."""
    names, times = list(curves), [t for t, _ in next(iter(curves.values()))]
    chosen = sorted({round(i * (len(times) - 1) / max(ROWS - 1, 1)) for i in range(ROWS)})
    lines = ["| t | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines.append("| mean | " + " | ".join(f"{mean(curve):.3f}" for curve in curves.values()) + " |")
    for i in chosen:
        lines.append(f"| {times[i]:.3f} | " + " | ".join(f"{curve[i][1]:.3f}" for curve in curves.values()) + " |")
    return "\n".join(lines)


def mean(curve):
    return sum(distance for _, distance in curve) / len(curve)


def save_plot(curves, path):
    """Write a PNG of the distances over t, noise on the left as in sampling."""
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=f"{name} (mean {mean(curve):.2f})")
    axes.set(xlabel="t (1 is noise, 0 is data)", ylabel="distance to the final features", xlim=(1, 0))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def choose_block(model, block):
    """The block to look at: required of a model of one branch, optional of others. Raises InputError."""
    if block is None and model.num_branches == 1:
        raise InputError(f"this model has one branch; name a block with --block (1 to {len(model.blocks) - 1})")
    if block is not None and not 1 <= block < len(model.blocks):
        raise InputError(f"--block {block} is out of range; 1 to {len(model.blocks) - 1} can be compared with the last")
    return block


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="checkpoint of ours, or a published file")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema")
    parser.add_argument("--df-idxs", nargs="+", help="key layers of a published file, as in generate.py")
    parser.add_argument("--dmf-depth", type=int, help="of a published flow map, as in generate.py")
    parser.add_argument("--legacy-scaling", action=argparse.BooleanOptionalAction, help="as in generate.py")
    parser.add_argument("--block", type=int, help="also the output of this block (from 1); SiT needs it")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--mode", choices=["sde", "ode"], default="sde")
    parser.add_argument("--num-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="JSON", help="file for all steps")
    parser.add_argument("--plot", metavar="PNG", help="picture to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for name in ("num_samples", "batch_size", "num_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"{shown(name)} {getattr(args, name)} must be at least 1")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            check_writable(path, flag)
    known = {"df_idxs": args.df_idxs, "dmf_depth": args.dmf_depth, "legacy_scaling": args.legacy_scaling}
    checkpoint = load_checkpoint(args.ckpt, args.weights, **known)
    if "num_classes" not in checkpoint.options:
        raise InputError(f"--ckpt {args.ckpt} is a text-to-image model; name a model of classes")
    set_math(allow_tf32=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = Probe(checkpoint.model.to(device), choose_block(checkpoint.model, args.block))
    sample(args, checkpoint, probe, device)
    curves = probe.curves()
    print(table(curves))
    if args.out:
        metrics = {f"distance, {name}": mean(curve) for name, curve in curves.items()}
        settings = {"model": checkpoint.run.get("model"), "step": checkpoint.steps, **vars(args)}
        write_result(args.out, args.ckpt, metrics, curves=curves, settings=settings)
    if args.plot:
        save_plot(curves, args.plot)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
