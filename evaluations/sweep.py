"""Guidance × steps × use of the branches: samples each setting, measures it, writes a table and a plot.

    python -m evaluations.sweep --ckpt CKPT --ref REF.npz --out results/sweep --num-fid-samples 5000 \\
        --cfg-scale 1.0 1.3 1.6 --interval 0,1 0.3,0.7 --num-steps 50 250 -- --mode ode --heun
    python -m evaluations.sweep --ckpt SEED_0 SEED_1 SEED_2 --ref digits --out results/ig --ig-scale 1 1.5 2

What follows `--` goes to generate.py. A setting that has been measured is not measured again: run the same command to
go on after an interruption. Several checkpoints, say of several seeds, give means ± standard errors, and differences
from the first setting, checkpoint by checkpoint. The metrics are those of evaluations.evaluator, or of digits.report
with `--ref digits`; the plot shows the Fréchet distance. best.txt holds generate.py's flags of the setting where that
is lowest: script/guided.sh goes on with them.
"""

import dataclasses
import itertools
import re
import sys
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import check_writable, write_atomically, write_json
from common.flags import BLOCKS, SAMPLER_STEPS, FlagTextError, flag, parse_early, parse_flags, required, shown
from evaluations.measuring import DIGITS, MeasuringFlags, check_generate, check_reference, make_result, split
from sampling.flags import BRANCH_FLAGS, GenerateConfig, gap

AS_THERE = "as in generate.py"


def interval(text):
    """`0.3,0.7` → (0.3, 0.7)."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise FlagTextError(f"{text!r} is not LOW,HIGH, for example 0.3,0.7") from None
    return low, high


@dataclasses.dataclass(kw_only=True)
class SweepFlags(MeasuringFlags):
    ckpt: list = required("checkpoint, or several to take the mean of", nargs="+", group="model")
    out: str = required("folder for samples, results, table.md, best.txt, plot.png", group="output")
    cfg_scale: list = flag((1.0,), "guidance scales", float, group="sampling", nargs="+")
    interval: list = flag(((0.0, 1.0),), "guided times", interval, group="sampling", nargs="+", metavar="LOW,HIGH")
    num_steps: list = flag((250,), "sampler steps", int, range=SAMPLER_STEPS, group="sampling", nargs="+")
    ig_scale: list = flag((), AS_THERE, float, group="branches", nargs="+")
    ig_branch: list = flag((), AS_THERE, int, range=BLOCKS, group="branches", nargs="+")
    cfg_exit: list = flag((), AS_THERE, int, range=BLOCKS, group="branches", nargs="+")
    exit_branch: list = flag((), AS_THERE, int, range=BLOCKS, group="branches", nargs="+")
    exit_schedule: list = flag((), AS_THERE, str, group="branches", nargs="+")
    branch_gap: list = flag((), AS_THERE, gap, group="branches", nargs="+")


if __name__ == "__main__":
    parse_early(SweepFlags, __doc__, argv=split(sys.argv[1:])[0])

from common.pictures import save_lines
from evaluations.metrics.results import Estimate, Result, markdown
from models.checkpoints import find_checkpoint
from models.hub import is_on_hub
from samplers import Guidance
from sampling.manifest import check_settings
from sampling.results import rounded
from sampling.sampler import open_checkpoint

RECORD = "sweep.json"  # in --out: flags common to all settings
SAME = ("ckpt", "ref", "num_samples", "features", "inception_weights")
REMEDY = "delete it to measure this setting again"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the sweep; guided while low ≤ t ≤ high; branches: (name, value) of BRANCH_FLAGS."""

    num_steps: int
    cfg_scale: float
    low: float = 0.0
    high: float = 1.0
    branches: tuple = ()

    @property
    def guided(self):
        return self.cfg_scale != 1

    @property
    def name(self):
        guidance = f"{self.cfg_scale}-{self.low}-{self.high}" if self.guided else "1.0"
        branches = "".join(f"{shown(name)[1:]}-{value}" for name, value in self.branches)
        return re.sub(r"[^\w.+-]+", "-", f"steps-{self.num_steps}-cfg-{guidance}{branches}")

    @property
    def flags(self):
        """Of generate.py."""
        guidance = ["--cfg-scale", self.cfg_scale, "--guidance-low", self.low, "--guidance-high", self.high]
        branches = [f"{shown(name)}={value}" for name, value in self.branches]  # argparse takes -1e-05 for a flag
        return ["--num-steps", self.num_steps, *guidance, *branches]

    @property
    def cells(self):
        """{column: value} of table and plot."""
        interval = {"interval": f"[{self.low}, {self.high}]"} if self.guided else {}
        branches = {shown(name)[2:]: value for name, value in self.branches}
        return {"steps": self.num_steps, "guidance": self.cfg_scale, **interval, **branches}


def settings(args):
    """Every combination; what does not matter without guidance, or without internal guidance, is not repeated there."""
    axes = {name: values for name in BRANCH_FLAGS if (values := getattr(args, name, ()))}
    found = []
    for steps, scale, times, *values in itertools.product(
        args.num_steps, args.cfg_scale, args.interval, *axes.values()
    ):
        branches = dict(zip(axes, values, strict=True))
        idle = ["cfg_exit"] * (scale == 1) + ["ig_branch"] * (branches.get("ig_scale") == 1)
        branches = tuple((name, value) for name, value in branches.items() if name not in idle)
        found.append(Setting(steps, scale, *(() if scale == 1 else times), branches=branches))
    return list(dict.fromkeys(found))


def measure(setting, args, generate):
    """Result of one setting: sampled and measured, unless it has been. generate: more flags of generate.py.

    Raises InputError if the file of the result is damaged or has other settings.
    """
    path = make_result(setting.name, args.ckpt, args, "generate.py", [*generate, *setting.flags])
    result = Result.read(path, REMEDY)
    about = {"num_steps": setting.num_steps, "cfg_scale": setting.cfg_scale, "num_fid_samples": args.num_samples}
    for name, value in {**about, **dict(setting.branches)}.items():
        if (found := getattr(result.manifest, name, None)) not in (None, value):
            raise InputError(f"{path} has a different {name} ({found}); {REMEDY}")
    if args.distance not in result.metrics:
        raise InputError(f"{path} holds no {args.distance}; {REMEDY}")
    return result


def values(results, metric):
    """The metric's value for each checkpoint; [] unless all have it."""
    found = [result.metrics.get(metric) for result in results]
    return [] if None in found else found


def build_table(rows, args):
    """Markdown of [(Setting, Results of the checkpoints)]; several: with differences of the distance from the first."""
    columns = list(dict.fromkeys(["steps", "guidance", "interval", *(name for row in rows for name in row[0].cells)]))
    metrics, first, cells = list(rows[0][1][0].metrics), values(rows[0][1], args.distance), []
    for setting, results in rows:
        evaluations = getattr(results[0].manifest, "model_evaluations", None)
        found = [setting.cells.get(column, "") for column in columns]
        found.append("" if evaluations is None else rounded(evaluations))
        found += [Estimate.of(numbers) if (numbers := values(results, name)) else "" for name in metrics]
        pairs = zip(values(results, args.distance), first, strict=True)
        cells.append([*found, *([Estimate.of([ours - theirs for ours, theirs in pairs])] if len(results) > 1 else [])])
    header = [*columns, "evaluations", *map(args.label, metrics), *["difference"] * (len(first) > 1)]
    return markdown(header, cells)


def save_plot(rows, args, path):
    """Write a PNG: the distance over the first of guidance scale, branch settings and steps that has several values.

    Bands are standard errors over the checkpoints.
    """
    cells = [setting.cells for setting, _ in rows]
    names = dict.fromkeys(
        ["guidance", *(name for of in cells for name in of if name not in ("steps", "interval")), "steps"]
    )
    x = next((name for name in names if len({of[name] for of in cells if name in of}) > 1), "guidance")
    found = [Estimate.of(values(results, args.distance)) for _, results in rows]
    rest = [{name: value for name, value in of.items() if name != x}.items() for of in cells]
    words = any(isinstance(of.get(x), str) for of in cells)
    lines = {}
    for line in (of for of in rest if not any(of < other for other in rest)):  # others are points of several lines
        points = [
            (str(of[x]) if words else of[x], y.mean, y.error or 0)
            for of, own, y in zip(cells, rest, found, strict=True)
            if own <= line and x in of
        ]
        points = points if words else sorted(points)
        lines[", ".join(f"{name} {value}" for name, value in line)] = points
    save_lines(lines, path, marker="o", xlabel=x, ylabel=args.label(args.distance))


def check(sweeps, generate):
    """Raise InputError, before the first setting, for anything that would fail a later one or mix two sweeps."""
    args, about = sweeps[0], {}
    inputs = [("--ckpt", each.ckpt) for each in sweeps if not is_on_hub(each.ckpt)]
    inputs += [("--ref", args.ref)] * (args.ref != DIGITS)
    if missing := [f"{flag} {path}" for flag, path in inputs if not Path(path).exists()]:
        raise InputError(f"{missing[0]} does not exist")
    given = parse_flags(GenerateConfig, ["--ckpt", args.ckpt, *generate])
    check_generate(given, args.ckpt, ("num_steps", "cfg_scale", "guidance_low", "guidance_high"))
    for setting in settings(args):
        Guidance(setting.cfg_scale, setting.low, setting.high).check([setting.low] * 2)  # for any sampler's times
    for each in sweeps:
        about[each.out] = {**{name: getattr(each, name) for name in SAME}, "generate": generate}
        check_writable(Path(each.out, "table.md"), "--out:")
        if Path(each.out, RECORD).exists():
            check_settings(Path(each.out), about[each.out], RECORD, "name another --out")
        check_checkpoint(each, generate)
    check_reference(args)
    for out, content in about.items():
        write_json(Path(out, RECORD), content)


def check_checkpoint(args, generate):
    """Raise InputError if the checkpoint lacks branches of a setting, or other weights were measured under its name."""
    measured = measured_weights(args)
    lines = [["--ckpt", args.ckpt, *map(str, of.flags), *generate] for of in settings(args) if of.branches or measured]
    configs = [parse_flags(GenerateConfig, line).resolve() for line in lines]
    checkpoint = open_checkpoint(configs[0])[0] if configs else None  # only if needed: it may be several GB
    for config in configs:
        config.for_model(checkpoint.model.kind, checkpoint.model.num_branches)
    now = checkpoint.weights_sha256() if measured else None
    if others := [name for name, weights in measured.items() if weights != now]:
        where = f"{Path(args.out, others[0])}.json and {Path(args.out, 'samples', others[0])}"
        remedy = "name another --out, or delete both"
        raise InputError(f"{where} are of weights other than --ckpt {args.ckpt} has now; {remedy}")


def measured_weights(args):
    """{name of a setting: hash of the weights} of the existing results that record one. Raises InputError."""
    paths = {of.name: Path(args.out, f"{of.name}.json") for of in settings(args)}
    manifests = {name: Result.read(path, REMEDY).manifest for name, path in paths.items() if path.exists()}
    return {name: found.weights_sha256 for name, found in manifests.items() if found and found.weights_sha256}


def per_checkpoint(args):
    """The flags of each checkpoint alone; several have a folder each. Raises InputError."""
    ckpts = [str(find_checkpoint(ckpt)) for ckpt in args.ckpt]  # fixed for all settings, as training may continue
    several = len(ckpts) > 1
    outs = [str(Path(args.out, f"checkpoint-{number}")) if several else args.out for number, _ in enumerate(ckpts, 1)]
    return [dataclasses.replace(args, ckpt=ckpt, out=out) for ckpt, out in zip(ckpts, outs, strict=True)]


def parse(argv):
    """(flags, words for generate.py)."""
    own, generate = split(argv)
    return parse_flags(SweepFlags, own, __doc__), generate


def measure_all(args, generate):
    """Results of all settings, of one checkpoint. Raises InputError."""
    results = [measure(setting, args, generate) for setting in settings(args)]
    if len({getattr(result.manifest, "weights_sha256", None) for result in results}) > 1:
        raise InputError(f"{args.out} holds results of weights other than --ckpt {args.ckpt}; name another --out")
    return results


def main(argv=None):
    args, generate = parse(sys.argv[1:] if argv is None else argv)
    sweeps = per_checkpoint(args)
    check(sweeps, generate)
    rows = list(zip(settings(args), zip(*(measure_all(each, generate) for each in sweeps), strict=True), strict=True))
    table = build_table(rows, args)
    save_plot(rows, args, Path(args.out, "plot.png"))
    best, _ = min(rows, key=lambda row: Estimate.of(values(row[1], args.distance)).mean)
    words = " ".join(map(str, best.flags))
    for name, text in (("table.md", table), ("best.txt", words)):
        write_atomically(Path(args.out, name), lambda file, text=text: file.write(f"{text}\n".encode()))
    print(f"{table}\n{args.num_samples} samples each, lowest: {words}\nin {args.out}: table.md, best.txt, plot.png")
    print(f"next: python generate.py --ckpt {sweeps[0].ckpt} {words}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
