"""Distance between what a model's branches end with and its final features, over all sampling steps (Figure 2d).

    python -m evaluations.feature_distance --ckpt CKPT --num-fid-samples 64 --json distance.json --plot distance.png
    python -m evaluations.feature_distance --ckpt SIT_CKPT --block 6

For every branch but the last: its tokens before VeRA (v*) and after it, against the tokens after the last block. A
model of one branch (SiT) is compared at --block. The paper states 7.7 for SiT, 7.2 with deep supervision and 2.9 for
DeepFlow-2T (B, 250 SDE steps), but not over what the Euclidean distance is taken: the curves are per token, and the
mean over all steps is given for each of REDUCTIONS.
"""

import collections
import dataclasses
from statistics import fmean

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable
from common.flags import BATCH, BLOCKS, IMAGES, SAMPLER_STEPS, SEED, flag, parse_early, parse_flags, required
from models.flags import PublishedFlags


@dataclasses.dataclass(kw_only=True)
class DistanceFlags(PublishedFlags):
    ckpt: str = required("checkpoint of ours, or a published file", group="model")
    weights: str = flag("ema", "averaged weights or raw ones", group="model", choices=["ema", "raw"])
    block: int | None = flag(None, "block (from 1) to compare too; SiT needs it", int, range=BLOCKS)
    num_samples: int = flag(64, "number of samples", range=IMAGES, group="sampling", name="--num-fid-samples")
    batch_size: int = flag(16, "samples per batch", range=BATCH, group="sampling", name="--per-proc-batch-size")
    mode: str = flag("sde", "sampler", group="sampling", choices=["sde", "ode"])
    num_steps: int = flag(250, "sampler steps", range=SAMPLER_STEPS, group="sampling")
    seed: int = flag(0, "seed of labels and noise", range=SEED, group="sampling")
    out: str | None = flag(None, "file for all steps", str, group="output", metavar="JSON", name="--json")
    plot: str | None = flag(None, "picture to write", str, group="output", metavar="PNG")


if __name__ == "__main__":
    parse_early(DistanceFlags, __doc__)

from common.pictures import save_lines
from common.precision import set_math
from common.processes import device_of_process
from common.progress import Progress
from evaluations.metrics.results import Result, markdown
from sampling.conditions import ClassLabels
from sampling.flags import GenerateConfig
from sampling.sampler import ImageSampler

REDUCTIONS = {  # of a difference (N, T, D) to distances (N,)
    "per token": lambda d: d.norm(dim=-1).mean(dim=1),  # over channels, then the mean over tokens
    "per image": lambda d: d.flatten(1).norm(dim=1),  # over tokens and channels
    "of the mean token": lambda d: d.mean(dim=1).norm(dim=-1),
}


class Probe:
    """The network as the sampler sees it, (x, t, y) → velocity; records every call's distances.

    block: number of a block to compare too; a model of one branch needs it. Raises InputError if it does not fit.
    """

    def __init__(self, model, block=None):
        last = len(model.blocks) - 1
        if block is None and model.num_branches == 1:
            raise InputError(f"this model has one branch; name a block with --block (1 to {last})")
        if block is not None and not 1 <= block <= last:
            raise InputError(f"--block {block} is out of range; 1 to {last} can be compared with the last")
        self.model, self.block = model, block
        self.distances = collections.defaultdict(list)  # {(reduction, feature, t): [one per sample]}
        if block is not None:
            model.blocks[block - 1].register_forward_hook(self.keep)

    def keep(self, _module, _inputs, output):
        self.block_output, _ = output  # tokens, text

    def __call__(self, x, t, y):
        *intermediate, final = self.model.run_branches(x, t, y)
        for number, branch in enumerate(intermediate, 1):
            self.record(f"branch {number}, before VeRA", t, branch.v_star, final.v_star)
            self.record(f"branch {number}, after VeRA", t, branch.aligned, final.v_star)
        if self.block is not None:
            self.record(f"block {self.block}", t, self.block_output, final.v_star)
        return self.model.velocity_of(final)

    def record(self, name, t, features, final):
        """Add the distances of one call, (N, T, D) each; t (N,) is one time for all."""
        difference = (features - final).double()
        for reduction, reduce in REDUCTIONS.items():
            self.distances[reduction, name, round(float(t[0]), 9)] += reduce(difference).tolist()

    def curves(self):
        """{reduction: {feature: [(t, mean distance)] from noise to data}}."""
        curves = {reduction: {} for reduction in REDUCTIONS}
        for (reduction, name, t), values in self.distances.items():
            curves[reduction].setdefault(name, []).append((t, fmean(values)))
        return curves


def mean(curve):
    return fmean(distance for _, distance in curve)


def main(argv=None):
    args = parse_flags(DistanceFlags, argv, __doc__)
    for path, name in ((args.out, "--json"), (args.plot, "--plot")):
        if path:
            check_writable(path, name)
    set_math(allow_tf32=True)
    given = {name: getattr(args, name) for name in ("ckpt", "weights", "mode", "num_steps")}
    sizes = {"num_fid_samples": args.num_samples, "per_proc_batch_size": args.batch_size, "global_seed": args.seed}
    config = GenerateConfig(**given, **sizes, **args.published(), decode=False)  # random classes, no guidance
    sampler = ImageSampler(config, ClassLabels, device_of_process())
    checkpoint = sampler.checkpoint
    sampler.network = probe = Probe(checkpoint.model, args.block)
    batches = sampler.config.batches()
    for _, wait in Progress(sampler.batches(batches), total=len(batches), unit="batch"):
        wait()  # checks the samples; they are discarded, since the probe records the network's calls
    curves = probe.curves()
    per_token, rows, metrics = curves["per token"], [], {}
    for reduction, of_feature in curves.items():
        rows.append([reduction, *(f"{mean(curve):.3f}" for curve in of_feature.values())])
        kind = "distance" if reduction == "per token" else f"distance {reduction}"
        metrics |= {f"{kind}, {name}": mean(curve) for name, curve in of_feature.items()}
    print(markdown(["mean distance", *per_token], rows))
    print(f"means over {args.num_samples} samples; the paper does not say which of these distances it uses")
    about = {"model": checkpoint.run.get("model"), "step": checkpoint.steps, "curves": "per token"}
    Result(metrics, args.ckpt, curves=per_token, settings={**about, **dataclasses.asdict(args)}).write(args.out)
    if args.plot:  # noise on the left, as in sampling
        lines = {f"{name} (mean {mean(curve):.2f})": curve for name, curve in per_token.items()}
        axes = {"xlabel": "t (1 is noise, 0 is data)", "ylabel": "distance to the final features"}
        save_lines(lines, args.plot, **axes, xlim=(1, 0))
        note(f"wrote {args.plot}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
