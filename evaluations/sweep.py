"""Guidance scale × interval × steps over one checkpoint: samples each setting, measures it, writes a table and a plot.

    python evaluations/sweep.py --ckpt CKPT --ref REF.npz --out results/sweep --num-samples 5000 \\
        --cfg-scale 1.0 1.3 1.6 --interval 0,1 0.3,0.7 --num-steps 50 250 -- --mode ode --heun

What follows `--` goes to generate.py. A setting that has been measured is not measured again: run the same command to
go on after an interruption. The metrics are those of evaluations/evaluator.py; the plot shows the Fréchet distance.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, write_atomically, write_json
from evaluations import evaluator
from evaluations.metrics.results import read_result

ROOT = Path(__file__).resolve().parent.parent


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
        values = {"num-steps": self.num_steps, "cfg-scale": self.cfg_scale}
        values.update({"guidance-low": self.low, "guidance-high": self.high})
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def settings(args):
    """Every combination; without guidance the interval does not matter, so there is one."""
    found = {}
    for steps, scale, (low, high) in itertools.product(args.num_steps, args.cfg_scale, args.interval):
        setting = Setting(steps, scale, *((low, high) if scale != 1 else (0.0, 1.0)))
        found[setting.name] = setting
    return list(found.values())


def interval(text):
    """`0.3,0.7` → (0.3, 0.7)."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH, for example 0.3,0.7") from None
    return low, high


def run_python(processes, script, flags):
    """Run a script of the repository, under torchrun where there are several processes. Raises InputError."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], check=False)
    if done.returncode:
        raise InputError(f"{script} ended with {done.returncode}; what it said stands above")


def measure(setting, args):
    """Result of one setting: sampled and measured, unless it has been."""
    result = args.out / f"{setting.name}.json"
    if not result.exists():
        note(f"sampling {setting.name}")
        folder = args.out / "samples" / setting.name
        flags = ["--ckpt", args.ckpt, "--sample-dir", folder, "--num-fid-samples", args.num_samples, *setting.flags()]
        run_python(args.processes, "generate.py", [*flags, *args.generate])
        found = sorted(folder.glob("*.npz"))
        if len(found) != 1:
            raise InputError(f"{folder} holds {len(found)} npz files instead of one; delete it and run this again")
        extractor = [("--inception-weights", args.inception_weights), ("--features", args.features)]
        flags = [word for flag, value in extractor if value for word in (flag, value)]
        flags += ["--other-size"] if args.other_size else []
        run_python(args.processes, "evaluations/evaluator.py", [args.ref, found[0], "--json", result, *flags])
    return read_result(result)


def build_table(rows, metrics):
    """Markdown lines of [(setting, result)]."""
    lines = ["| steps | guidance | interval | evaluations | " + " | ".join(map(evaluator.label, metrics)) + " |"]
    lines.append("|---" * (4 + len(metrics)) + "|")
    for setting, result in rows:
        where = f"[{setting.low}, {setting.high}]" if setting.cfg_scale != 1 else ""
        calls = (result.get("manifest") or {}).get("model_evaluations", "")
        values = " | ".join(f"{result['metrics'][name]:.4g}" for name in metrics)
        lines.append(f"| {setting.num_steps} | {setting.cfg_scale} | {where} | {calls} | {values} |")
    return lines


def save_plot(rows, metric, path):
    """Write a PNG: the metric over the guidance scale, a line for every number of steps and interval."""
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    unguided = {setting.num_steps: result["metrics"][metric] for setting, result in rows if setting.cfg_scale == 1}
    curves = {}
    for setting, result in rows:
        if setting.cfg_scale != 1:
            key = (setting.num_steps, setting.low, setting.high)
            curves.setdefault(key, []).append((setting.cfg_scale, result["metrics"][metric]))
    for steps in unguided.keys() - {key[0] for key in curves}:
        curves[(steps, 0.0, 1.0)] = []
    for (steps, low, high), points in sorted(curves.items()):
        points += [(1.0, unguided[steps])] if steps in unguided else []
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{steps} steps, [{low}, {high}]")
    axes.set(xlabel="guidance scale", ylabel=evaluator.label(metric))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--ref", required=True, metavar="NPZ", help="reference of evaluations/evaluator.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for samples, results, table.md and plot.png")
    parser.add_argument("--num-samples", type=int, default=5000, help="samples of each setting")
    parser.add_argument("--cfg-scale", type=float, nargs="+", default=[1.0])
    parser.add_argument("--interval", type=interval, nargs="+", default=[(0.0, 1.0)], metavar="LOW,HIGH")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[250])
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, for sampling and measuring")
    parser.add_argument("--inception-weights", metavar="FILE", help="as in evaluations/evaluator.py")
    parser.add_argument("--features", metavar="NAME", help="as in evaluations/evaluator.py")
    parser.add_argument("--other-size", action="store_true", help="as in evaluations/evaluator.py")
    args = parser.parse_args(argv[:cut])
    args.generate = argv[cut + 1 :]
    return args


def check_same(args):
    """Raise InputError where --out holds the results of another sweep; remember what this one is about."""
    record = args.out / "sweep.json"
    about = {"ckpt": args.ckpt, "ref": args.ref, "num_samples": args.num_samples, "features": args.features}
    about.update(inception_weights=args.inception_weights, generate=args.generate)
    if record.exists():
        found = json.loads(record.read_text())
        changed = [key for key in about if found.get(key) != about[key]]
        if changed:
            raise InputError(
                f"{args.out} holds a sweep with another {changed[0]} ({found.get(changed[0])}); name another --out"
            )
    write_json(record, about)


def main(argv=None):
    args = parse_args(argv)
    for flag, path in (("--ckpt", args.ckpt), ("--ref", args.ref)):
        if not Path(path).exists():
            raise InputError(f"{flag} {path} does not exist")
    check_writable(args.out / "table.md", "--out:")
    check_same(args)
    rows = [(setting, measure(setting, args)) for setting in settings(args)]
    metrics = list(rows[0][1]["metrics"])
    table = "\n".join(build_table(rows, metrics))
    write_atomically(args.out / "table.md", lambda file: file.write(f"{table}\n".encode()))
    fid = next(name for name in metrics if name.startswith("f"))
    save_plot(rows, fid, args.out / "plot.png")
    print(f"{table}\nwrote {args.out / 'table.md'} and {args.out / 'plot.png'}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
