"""Guidance scale × interval × steps over one checkpoint: samples each setting, measures it, writes a table and a plot.

    python -m evaluations.sweep --ckpt CKPT --ref REF.npz --out results/sweep --num-samples 5000 \\
        --cfg-scale 1.0 1.3 1.6 --interval 0,1 0.3,0.7 --num-steps 50 250 -- --mode ode --heun

What follows `--` goes to generate.py. A setting that has been measured is not measured again: run the same command to
go on after an interruption. The metrics are those of evaluations.evaluator; the plot shows the Fréchet distance.
"""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, read_json, write_atomically, write_json
from common.flags import ROOT, FlagTextError, Range, flag, parse_flags, required
from common.pictures import save_lines
from evaluations.evaluator import label
from evaluations.metrics.results import Result, markdown

SAME = ("ckpt", "ref", "num_samples", "features", "inception_weights")  # in all settings of one folder


def interval(text):
    """`0.3,0.7` → (0.3, 0.7)."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise FlagTextError(f"{text!r} is not LOW,HIGH, for example 0.3,0.7") from None
    return low, high


@dataclasses.dataclass(kw_only=True)
class SweepFlags:
    """Flags of this program; those of generate.py follow `--`."""

    ckpt: str = required("checkpoint", group="model")
    ref: str = required("reference of evaluations.evaluator", metavar="NPZ")
    out: Path = required("folder for samples, results, table.md and plot.png", Path, group="output")
    num_samples: int = flag(5000, "samples of each setting", range=Range(1), group="sampling")
    cfg_scale: list = flag((1.0,), "guidance scales", float, group="sampling", nargs="+")
    interval: list = flag(((0.0, 1.0),), "guided times", interval, group="sampling", nargs="+", metavar="LOW,HIGH")
    num_steps: list = flag((250,), "sampler steps", int, range=Range(1), group="sampling", nargs="+")
    processes: int = flag(1, "of torchrun, for sampling and measuring", range=Range(1), group="precision and speed")
    inception_weights: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="FILE")
    features: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="NAME")
    other_size: bool = flag(False, "as in evaluations.evaluator", group="distances")

    def check(self):
        """Raise InputError for files that are not there."""
        for name in ("ckpt", "ref"):
            if not Path(getattr(self, name)).exists():
                raise InputError(f"--{name} {getattr(self, name)} does not exist")
        check_writable(self.out / "table.md", "--out:")

    def evaluator_flags(self):
        """Those that the evaluator takes too."""
        values = {"--inception-weights": self.inception_weights, "--features": self.features}
        words = [word for pair in values.items() if pair[1] for word in pair]
        return [*words, "--other-size"] if self.other_size else words


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the sweep; guided while low ≤ t ≤ high."""

    num_steps: int
    cfg_scale: float
    low: float
    high: float

    @property
    def name(self):
        guided = f"-cfg-{self.cfg_scale}-{self.low}-{self.high}" if self.cfg_scale != 1 else "-cfg-1.0"
        return f"steps-{self.num_steps}{guided}"

    def flags(self):
        steps = ["--num-steps", self.num_steps, "--cfg-scale", self.cfg_scale]
        return [*steps, "--guidance-low", self.low, "--guidance-high", self.high]


def settings(args):
    """Every combination; without guidance the interval does not matter, so there is one."""
    found = {}
    for steps, scale, (low, high) in itertools.product(args.num_steps, args.cfg_scale, args.interval):
        setting = Setting(steps, scale, *((low, high) if scale != 1 else (0.0, 1.0)))
        found[setting.name] = setting
    return list(found.values())


def run_python(processes, *command):
    """Run a program of the repository, under torchrun where there are several processes. Raises InputError."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = [*(torchrun if processes > 1 else []), *command]
    done = subprocess.run([sys.executable, *map(str, words)], check=False)
    if done.returncode:
        name = command[1] if command[0] == "-m" else command[0]
        raise InputError(f"{name} ended with {done.returncode}; see its output above")


def measure(setting, args, generate):
    """Result of one setting: sampled and measured, unless it has been. generate: more flags of generate.py."""
    path = args.out / f"{setting.name}.json"
    if not path.exists():
        note(f"sampling {setting.name}")
        folder = args.out / "samples" / setting.name
        flags = ["--ckpt", args.ckpt, "--sample-dir", folder, "--num-fid-samples", args.num_samples, *setting.flags()]
        run_python(args.processes, ROOT / "generate.py", *flags, *generate)
        found = sorted(folder.glob("*.npz"))
        if len(found) != 1:
            raise InputError(f"{folder} holds {len(found)} npz files instead of one; delete it and run this again")
        flags = [args.ref, found[0], "--json", path, *args.evaluator_flags()]
        run_python(args.processes, "-m", "evaluations.evaluator", *flags)
    return Result.read(path)


def build_table(rows, metrics):
    """Markdown lines of [(setting, Result)]."""
    cells = []
    for setting, result in rows:
        where = f"[{setting.low}, {setting.high}]" if setting.cfg_scale != 1 else ""
        calls = (result.manifest or {}).get("model_evaluations", "")
        values = (f"{result.metrics[name]:.4g}" for name in metrics)
        cells.append([setting.num_steps, setting.cfg_scale, where, calls, *values])
    return markdown(["steps", "guidance", "interval", "evaluations", *map(label, metrics)], cells)


def save_plot(rows, metric, path):
    """Write a PNG: the metric over the guidance scale, a line for every number of steps and interval."""
    unguided = {setting.num_steps: result.metrics[metric] for setting, result in rows if setting.cfg_scale == 1}
    curves = {}
    for setting, result in rows:
        if setting.cfg_scale != 1:
            key = (setting.num_steps, setting.low, setting.high)
            curves.setdefault(key, []).append((setting.cfg_scale, result.metrics[metric]))
    for steps in unguided.keys() - {key[0] for key in curves}:
        curves[(steps, 0.0, 1.0)] = []
    lines = {}
    for (steps, low, high), points in sorted(curves.items()):
        points += [(1.0, unguided[steps])] if steps in unguided else []
        lines[f"{steps} steps, [{low}, {high}]"] = sorted(points)
    save_lines(lines, path, marker="o", xlabel="guidance scale", ylabel=label(metric))


def check_same(args, generate):
    """Raise InputError where --out holds the results of another sweep; remember what this one is about."""
    record = args.out / "sweep.json"
    about = {**{name: getattr(args, name) for name in SAME}, "generate": generate}
    if record.exists():
        found = read_json(record)
        changed = [key for key in about if found.get(key) != about[key]]
        if changed:
            raise InputError(
                f"{args.out} holds a sweep with another {changed[0]} ({found.get(changed[0])}); name another --out"
            )
    write_json(record, about)


def parse(argv):
    """(flags, words after `--`, which generate.py gets)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parse_flags(SweepFlags, argv[:cut], __doc__), argv[cut + 1 :]


def main(argv=None):
    args, generate = parse(sys.argv[1:] if argv is None else argv)
    args.check()
    check_same(args, generate)
    rows = [(setting, measure(setting, args, generate)) for setting in settings(args)]
    metrics = list(rows[0][1].metrics)
    table = "\n".join(build_table(rows, metrics))
    write_atomically(args.out / "table.md", lambda file: file.write(f"{table}\n".encode()))
    fid = next(name for name in metrics if name.startswith("f"))
    save_plot(rows, fid, args.out / "plot.png")
    print(f"{table}\nwrote {args.out / 'table.md'} and {args.out / 'plot.png'}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
