"""Guidance scale × interval × steps over one checkpoint: samples each setting, measures it, writes a table and a plot.

    python -m evaluations.sweep --ckpt CKPT --ref REF.npz --out results/sweep --num-fid-samples 5000 \\
        --cfg-scale 1.0 1.3 1.6 --interval 0,1 0.3,0.7 --num-steps 50 250 -- --mode ode --heun

What follows `--` goes to generate.py. A setting that has been measured is not measured again: run the same command to
go on after an interruption. The metrics are those of evaluations.evaluator; the plot shows the Fréchet distance.
best.txt holds generate.py's flags of the setting where that is lowest: script/guided.sh goes on with them.
"""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, write_atomically, write_json
from common.flags import (
    IMAGES,
    ROOT,
    SAMPLER_STEPS,
    WORKERS,
    FlagTextError,
    flag,
    parse_early,
    parse_flags,
    required,
    shown,
)


def interval(text):
    """`0.3,0.7` → (0.3, 0.7)."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise FlagTextError(f"{text!r} is not LOW,HIGH, for example 0.3,0.7") from None
    return low, high


@dataclasses.dataclass(kw_only=True)
class SweepFlags:
    ckpt: str = required("checkpoint", group="model")
    ref: str = required("reference of evaluations.evaluator", metavar="NPZ")
    out: str = required("folder for samples, results, table.md, best.txt, plot.png", group="output")
    num_samples: int = flag(5000, "samples per setting", range=IMAGES, group="sampling", name="--num-fid-samples")
    cfg_scale: list = flag((1.0,), "guidance scales", float, group="sampling", nargs="+")
    interval: list = flag(((0.0, 1.0),), "guided times", interval, group="sampling", nargs="+", metavar="LOW,HIGH")
    num_steps: list = flag((250,), "sampler steps", int, range=SAMPLER_STEPS, group="sampling", nargs="+")
    processes: int = flag(1, "processes for sampling and measuring", range=WORKERS, group="precision and speed")
    inception_weights: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="FILE")
    features: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="NAME")
    other_size: bool = flag(False, "as in evaluations.evaluator", group="distances")

    @property
    def distance(self):
        """Name of the Fréchet distance among the evaluator's metrics."""
        return f"fd_{features_name(self.features)}" if self.features else "fid"


def split(words):
    """(words before `--`, those after it, which generate.py gets)."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


if __name__ == "__main__":
    parse_early(SweepFlags, __doc__, argv=split(sys.argv[1:])[0])

from common.pictures import save_lines
from common.processes import Processes
from evaluations.evaluator import EvaluatorFlags, check_inputs, label
from evaluations.metrics.features import features_name
from evaluations.metrics.results import Result, markdown
from models.checkpoints import find_checkpoint
from samplers import Guidance
from sampling.manifest import check_settings

RECORD = "sweep.json"  # in --out: flags common to all settings
SAME = ("ckpt", "ref", "num_samples", "features", "inception_weights")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the sweep; guided while low ≤ t ≤ high."""

    num_steps: int
    cfg_scale: float
    low: float = 0.0
    high: float = 1.0

    @property
    def guided(self):
        return self.cfg_scale != 1

    @property
    def name(self):
        guidance = f"{self.cfg_scale}-{self.low}-{self.high}" if self.guided else "1.0"
        return f"steps-{self.num_steps}-cfg-{guidance}"

    @property
    def flags(self):
        """Of generate.py."""
        guidance = ["--cfg-scale", self.cfg_scale, "--guidance-low", self.low, "--guidance-high", self.high]
        return ["--num-steps", self.num_steps, *guidance]


def settings(args):
    """Every combination; without guidance the interval does not matter, so there is one."""
    combinations = itertools.product(args.num_steps, args.cfg_scale, args.interval)
    found = (Setting(steps, scale, *(() if scale == 1 else times)) for steps, scale, times in combinations)
    return list(dict.fromkeys(found))


def run_python(processes, *command):
    """Run a program of the repository, under torchrun where there are several processes. Raises InputError."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = map(str, [*(torchrun if processes > 1 else []), *command])
    if code := subprocess.run([sys.executable, *words], check=False).returncode:
        name = command[1] if command[0] == "-m" else command[0]
        raise InputError(f"{name} ended with {code}; see its output above")


def measuring(args, samples):
    """Arguments of the evaluator."""
    words = [args.ref, str(samples)]
    for name in ("inception_weights", "features"):
        words += [shown(name), getattr(args, name)] if getattr(args, name) else []
    return words + (["--other-size"] if args.other_size else [])


def measure(setting, args, generate):
    """Result of one setting: sampled and measured, unless it has been. generate: more flags of generate.py."""
    path, folder = Path(args.out, f"{setting.name}.json"), Path(args.out, "samples", setting.name)
    if not path.exists():
        note(f"sampling {setting.name}")
        flags = ["--ckpt", args.ckpt, "--sample-dir", folder, "--num-fid-samples", args.num_samples]
        run_python(args.processes, ROOT / "generate.py", *flags, *setting.flags, *generate)
        found = list(folder.glob("*.npz"))
        if len(found) != 1:
            raise InputError(f"{folder} holds {len(found)} npz files instead of one; delete it and run this again")
        run_python(args.processes, "-m", "evaluations.evaluator", *measuring(args, found[0]), "--json", path)
    return read_result(path, setting, args)


def read_result(path, setting, args):
    """Result of a setting. Raises InputError if the file is damaged or has other settings."""
    remedy = "delete it to measure this setting again"
    result = Result.read(path, remedy)
    about = {"num_steps": setting.num_steps, "cfg_scale": setting.cfg_scale, "num_fid_samples": args.num_samples}
    for name, value in about.items():
        if (found := getattr(result.manifest, name, None)) not in (None, value):
            raise InputError(f"{path} has a different {name} ({found}); {remedy}")
    if args.distance not in result.metrics:
        raise InputError(f"{path} holds no {args.distance}; {remedy}")
    return result


def build_table(rows, metrics):
    """Markdown of [(setting, Result)]."""
    cells = []
    for setting, result in rows:
        where = f"[{setting.low}, {setting.high}]" if setting.guided else ""
        calls = getattr(result.manifest, "model_evaluations", "")
        values = (f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in metrics)
        cells.append([setting.num_steps, setting.cfg_scale, where, calls, *values])
    return markdown(["steps", "guidance", "interval", "evaluations", *map(label, metrics)], cells)


def save_plot(rows, metric, path):
    """Write a PNG: the metric over the guidance scale, a line for every number of steps and interval."""
    guided = [row for row in rows if row[0].guided]
    lines = {}
    for steps, low, high in sorted({(setting.num_steps, setting.low, setting.high) for setting, _ in guided or rows}):
        lines[f"{steps} steps, [{low}, {high}]"] = sorted(
            (setting.cfg_scale, result.metrics[metric])
            for setting, result in rows
            if setting.num_steps == steps and (not setting.guided or (setting.low, setting.high) == (low, high))
        )
    save_lines(lines, path, marker="o", xlabel="guidance scale", ylabel=label(metric))


def check(args, generate):
    """Raise InputError, before the first setting, for anything that would fail a later one or mix two sweeps."""
    for name in ("ckpt", "ref"):
        if not Path(getattr(args, name)).exists():
            raise InputError(f"{shown(name)} {getattr(args, name)} does not exist")
    for setting in settings(args):
        Guidance(setting.cfg_scale, setting.low, setting.high).check([setting.low] * 2)  # for any sampler's times
    out, about = Path(args.out), {**{name: getattr(args, name) for name in SAME}, "generate": generate}
    check_writable(out / "table.md", "--out:")
    if (out / RECORD).exists():
        check_settings(out, about, RECORD, "name another --out")
    check_inputs(parse_flags(EvaluatorFlags, measuring(args, "samples")), Processes.join("cpu"))
    write_json(out / RECORD, about)


def parse(argv):
    """(flags, words for generate.py)."""
    own, generate = split(argv)
    return parse_flags(SweepFlags, own, __doc__), generate


def main(argv=None):
    args, generate = parse(sys.argv[1:] if argv is None else argv)
    args.ckpt = str(find_checkpoint(args.ckpt))  # fixed for all settings, as training may continue
    check(args, generate)
    rows = [(setting, measure(setting, args, generate)) for setting in settings(args)]
    if len({getattr(result.manifest, "weights_sha256", None) for _, result in rows}) > 1:
        raise InputError(f"{args.out} holds results of weights other than --ckpt {args.ckpt}; name another --out")
    table = build_table(rows, list(rows[0][1].metrics))
    save_plot(rows, args.distance, Path(args.out, "plot.png"))
    best, _ = min(rows, key=lambda row: row[1].metrics[args.distance])
    words = " ".join(map(str, best.flags))
    for name, text in (("table.md", table), ("best.txt", words)):
        write_atomically(Path(args.out, name), lambda file, text=text: file.write(f"{text}\n".encode()))
    print(f"{table}\n{args.num_samples} samples each, lowest: {words}\nin {args.out}: table.md, best.txt, plot.png")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
