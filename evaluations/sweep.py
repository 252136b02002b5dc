"""Guidance scale × interval × steps over one checkpoint: samples each setting, measures it, writes a table and a plot.

    python -m evaluations.sweep --ckpt CKPT --ref REF.npz --out results/sweep --num-samples 5000 \\
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
from common.flags import IMAGES, ROOT, SAMPLER_STEPS, WORKERS, FlagTextError, flag, parse_flags, required, shown
from common.pictures import save_lines
from common.records import read_record
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


def folder(text):
    """Path of a text; empty text, whose Path would be the current folder, stays empty."""
    return text and Path(text)


@dataclasses.dataclass(kw_only=True)
class SweepFlags:
    ckpt: str = required("checkpoint", group="model")
    ref: str = required("reference of evaluations.evaluator", metavar="NPZ")
    out: Path = required("folder for samples, results, table.md, best.txt, plot.png", folder, group="output")
    num_samples: int = flag(5000, "samples per setting", range=IMAGES, group="sampling")
    cfg_scale: list = flag((1.0,), "guidance scales", float, group="sampling", nargs="+")
    interval: list = flag(((0.0, 1.0),), "guided times", interval, group="sampling", nargs="+", metavar="LOW,HIGH")
    num_steps: list = flag((250,), "sampler steps", int, range=SAMPLER_STEPS, group="sampling", nargs="+")
    processes: int = flag(1, "processes for sampling and measuring", range=WORKERS, group="precision and speed")
    inception_weights: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="FILE")
    features: str | None = flag(None, "as in evaluations.evaluator", str, group="features", metavar="NAME")
    other_size: bool = flag(False, "as in evaluations.evaluator", group="distances")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the sweep; guided while low ≤ t ≤ high."""

    num_steps: int
    cfg_scale: float
    low: float
    high: float

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
    found = [Setting(steps, scale, *((0.0, 1.0) if scale == 1 else times)) for steps, scale, times in combinations]
    return list(dict.fromkeys(found))


def run_python(processes, *command):
    """Run a program of the repository, under torchrun where there are several processes. Raises InputError."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    words = map(str, [*(torchrun if processes > 1 else []), *command])
    if code := subprocess.run([sys.executable, *words], check=False).returncode:
        name = command[1] if command[0] == "-m" else command[0]
        raise InputError(f"{name} ended with {code}; see its output above")


def measure(setting, args, generate):
    """Result of one setting: sampled and measured, unless it has been. generate: more flags of generate.py."""
    path, folder = args.out / f"{setting.name}.json", args.out / "samples" / setting.name
    if path.exists():
        return Result.read(path)
    note(f"sampling {setting.name}")
    flags = ["--ckpt", args.ckpt, "--sample-dir", folder, "--num-fid-samples", args.num_samples]
    run_python(args.processes, ROOT / "generate.py", *flags, *setting.flags, *generate)
    found = list(folder.glob("*.npz"))
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} npz files instead of one; delete it and run this again")
    flags = [args.ref, found[0], "--json", path]
    for name in ("inception_weights", "features"):
        flags += [shown(name), getattr(args, name)] if getattr(args, name) else []
    flags += ["--other-size"] if args.other_size else []
    run_python(args.processes, "-m", "evaluations.evaluator", *flags)
    return Result.read(path)


def build_table(rows, metrics):
    """Markdown of [(setting, Result)]."""
    cells = []
    for setting, result in rows:
        where = f"[{setting.low}, {setting.high}]" if setting.guided else ""
        calls = (result.manifest or {}).get("model_evaluations", "")
        values = (f"{result.metrics[name]:.4g}" for name in metrics)
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


def check_same(args, generate):
    """Raise InputError where --out holds the results of another sweep; remember what this one is about."""
    record = args.out / "sweep.json"
    about = {**{name: getattr(args, name) for name in SAME}, "generate": generate}
    found = read_record(dict, record, "name another --out") if record.exists() else about
    for key in about:
        if found.get(key) != about[key]:
            raise InputError(f"{args.out} holds a sweep with another {key} ({found.get(key)}); name another --out")
    write_json(record, about)


def parse(argv):
    """(flags, words after `--`, which generate.py gets)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return parse_flags(SweepFlags, argv[:cut], __doc__), argv[cut + 1 :]


def main(argv=None):
    args, generate = parse(sys.argv[1:] if argv is None else argv)
    for name in ("ckpt", "ref"):
        if not Path(getattr(args, name)).exists():
            raise InputError(f"--{name} {getattr(args, name)} does not exist")
    check_writable(args.out / "table.md", "--out:")
    check_same(args, generate)
    rows = [(setting, measure(setting, args, generate)) for setting in settings(args)]
    metrics = list(rows[0][1].metrics)
    table = build_table(rows, metrics)
    write_atomically(args.out / "table.md", lambda file: file.write(f"{table}\n".encode()))
    fid = next(name for name in metrics if name.startswith("f"))
    save_plot(rows, fid, args.out / "plot.png")
    best, _ = min(rows, key=lambda row: row[1].metrics[fid])
    words = " ".join(map(str, best.flags))
    write_atomically(args.out / "best.txt", lambda file: file.write(f"{words}\n".encode()))
    print(f"{table}\nlowest: {words}\nwrote {args.out / 'table.md'}, best.txt and plot.png")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
