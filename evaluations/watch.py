"""Measure the checkpoints of a run during training: a curve over its steps, and the best checkpoint.

    python -m evaluations.watch exps/b2 --ref VIRTUAL_imagenet256_labeled.npz --num-fid-samples 5000 -- --mode ode
    python -m evaluations.watch exps/digits --ref digits --metric "label agreement" --once

Flags after `--` go to generate.py. The program is independent of training and best runs on a GPU of its own
(CUDA_VISIBLE_DEVICES). It writes RUN/watch: a JSON file for each measured step, curve.json, curve.png, and best.pt, the
best checkpoint by --metric, which is kept when training deletes its own. The program ends when the run's last
checkpoint has been measured. After an interruption, the same command resumes.
"""

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, locked, read_bytes, remove_leftovers, write_json
from common.flags import LARGEST, Range, flag, parse_early, parse_flags, required
from common.records import Count, read_record
from evaluations.measuring import DIGITS, MeasuringFlags, check_generate, check_reference, make_result, split
from models.presets import PRESETS
from sampling.flags import GenerateConfig, TextGenerateConfig


@dataclasses.dataclass(kw_only=True)
class WatchFlags(MeasuringFlags):
    run: str = required("folder of a run", positional=True, metavar="RUN")
    metric: str | None = flag(None, "decides which is best; named as in the results; default: Fréchet distance", str)
    out: str | None = flag(None, "folder for the results; default: RUN/watch", str, group="output")
    once: bool = flag(False, "measure the checkpoints that exist now, then end", group="output")
    every: int = flag(60, "seconds between checks for new checkpoints", range=Range(low=1, high=86_400), group="output")


if __name__ == "__main__":
    parse_early(WatchFlags, __doc__, argv=split(sys.argv[1:])[0])

from common.pictures import save_lines
from evaluations.metrics.results import LABELS, OTHER, Result, is_better
from models.checkpoints import STEP, checkpoint_path, existing_steps
from sampling.manifest import check_settings
from training.logs import parse_line

RECORD = "watch.json"  # in --out: flags that all steps share
SAME = ("ref", "num_samples", "features", "inception_weights", "metric")


@dataclasses.dataclass
class Settings:
    """The entries of a run's config.json that are read."""

    model: str
    max_train_steps: Count
    epochs: Count = LARGEST  # missing in older runs

    @classmethod
    def read(cls, run):
        return read_record(cls, Path(run, "config.json"), "name the folder of a run that has started")

    @property
    def is_text(self):
        return self.model in PRESETS and PRESETS[self.model].kind == "text"

    @property
    def program(self):
        return "generate_t2i.py" if self.is_text else "generate.py"


def is_finished(run):
    """Whether the run has the checkpoint of its last step, by --max-train-steps or --epochs. Raises InputError."""
    settings, log = Settings.read(run), Path(run, "log.jsonl")
    *lines, _ = read_bytes(log, "restore it").split(b"\n") if log.exists() else [b""]  # the last may be incomplete
    last = parse_line(lines[-1], log) if lines else {"step": 0}
    is_last = last["step"] >= settings.max_train_steps or last.get("epoch", 0) >= settings.epochs
    return is_last and int(last["step"]) in existing_steps(run)


def hold(args, step):
    """Link or copy a checkpoint into --out, where training cannot delete it; returns whether it is there."""
    source, held = checkpoint_path(args.run, step), checkpoint_path(args.out, step)
    partial = held.with_name(f".{held.name}.{os.getpid()}.tmp")
    try:
        if not held.exists() or held.stat().st_mtime_ns != source.stat().st_mtime_ns:
            held.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(held)
            try:
                os.link(source, partial)
            except OSError:  # --out is on another file system, or there are no links
                shutil.copy2(source, partial)
            shutil.rmtree(Path(args.out, "samples", held.stem), ignore_errors=True)  # from before a rewind
            os.replace(partial, held)
    except FileNotFoundError:  # training has deleted it
        note(f"{source} is gone{'; its copy is measured' if held.exists() else ' and cannot be measured'}")
    return held.exists()


def measure(args, step, generate):
    """Measure the checkpoint of a step if that is not done yet, and keep it if it is the best."""
    held, path = checkpoint_path(args.out, step), Path(args.out, f"{step:07d}.json")
    if not path.exists():
        if not hold(args, step):
            return
        make_result(path.stem, held, args, Settings.read(args.run).program, ["--format", "npz", *generate])
        shutil.rmtree(Path(args.out, "samples", path.stem))
    elif not held.exists():
        return
    best = save_curve(args)
    if step == best:
        os.replace(held, Path(args.out, "best.pt"))
    held.unlink(missing_ok=True)  # still there if best.pt was a link to the same file: a rename then does nothing
    value = Result.read(path).metrics[args.metric]
    print(f"step {step:,}: {args.label(args.metric)} {value:.4g}{', the best so far' * (step == best)}", flush=True)


def forget_rewound(args):
    """Delete the checkpoints and results that a rewind has outdated, and best.pt if it is of such a step."""
    for step in existing_steps(args.out):  # left by an interrupted measurement
        held, abandoned = checkpoint_path(args.out, step), Path(f"{checkpoint_path(args.run, step)}.abandoned")
        if abandoned.exists() and abs(abandoned.stat().st_mtime - held.stat().st_mtime) < 2:  # seconds: it is a copy
            held.unlink()
    for step, path in results(args).items():
        if is_outdated(args, step, path.stat().st_mtime):
            if save_curve(args) == step:
                Path(args.out, "best.pt").unlink(missing_ok=True)
            path.unlink()


def is_outdated(args, step, time):
    """Whether a rewound run has rewritten a checkpoint or set it aside since `time`."""
    checkpoint = checkpoint_path(args.run, step)
    try:
        return checkpoint.stat().st_mtime > time
    except FileNotFoundError:
        abandoned = Path(f"{checkpoint}.abandoned")
        return abandoned.exists() and abandoned.stat().st_ctime > time  # renaming changes the ctime


def results(args):
    """{step: result file} of the measured steps."""
    return {int(path.stem): path for path in Path(args.out).glob("*.json") if STEP.fullmatch(path.stem)}


def save_curve(args):
    """Write curve.json and curve.png from all results; returns the best step or None. Raises InputError."""
    paths, remedy = results(args), "delete it, and the step is measured again"
    measured = {step: Result.read(path, remedy).metrics for step, path in paths.items()}
    best, curves = None, {}
    for step, metrics in sorted(measured.items()):
        if args.metric not in metrics:
            raise InputError(f"{paths[step]} has no {args.metric}; {remedy}, or choose another --metric")
        if best is None or is_better(args.metric, metrics[args.metric], measured[best][args.metric]):
            best = step
        for name, value in metrics.items():
            curves.setdefault(name, []).append((step, value))
    if best is None:
        return None
    write_json(Path(args.out, "curve.json"), {"metric": args.metric, "best": best, "curves": curves})
    label = args.label(args.metric)
    save_lines({label: curves[args.metric]}, Path(args.out, "curve.png"), marker="o", xlabel="step", ylabel=label)
    return best


def check(args, generate):
    """Raise InputError early for what would fail later or mix results; returns the flags with defaults filled in."""
    settings = Settings.read(args.run)
    words = ["--ckpt", args.run, *generate]
    check_generate(parse_flags(TextGenerateConfig if settings.is_text else GenerateConfig, words), args.run)
    if args.ref != DIGITS and not Path(args.ref).exists():
        raise InputError(f"--ref {args.ref} does not exist; name a reference file, or pass --ref digits")
    args = dataclasses.replace(args, metric=args.metric or args.distance, out=args.out or str(Path(args.run, "watch")))
    known = [f"{kind}_{args.extractor}" for kind in OTHER] if args.features else list(LABELS)
    known = [args.distance, "label agreement"] if args.ref == DIGITS else known
    if args.metric not in known:
        raise InputError(f"--metric {args.metric} is not measured with these flags; choose one of {', '.join(known)}")
    if args.once and not existing_steps(args.run):
        raise InputError(f"{args.run} holds no checkpoint yet; leave --once out to wait for the first")
    check_writable(Path(args.out, RECORD), "--out:")
    about = {**{name: getattr(args, name) for name in SAME}, "generate": generate}
    if Path(args.out, RECORD).exists():
        check_settings(Path(args.out), about, RECORD, "name another --out")
    check_reference(args)
    write_json(Path(args.out, RECORD), about)
    return args


def main(argv=None):
    own, generate = split(sys.argv[1:] if argv is None else argv)
    args = check(parse_flags(WatchFlags, own, __doc__), generate)
    with locked(args.out, "--out"):
        while True:
            last_look = args.once or is_finished(args.run)  # checked first, so that the list below is complete
            forget_rewound(args)
            for step in sorted({*existing_steps(args.run), *existing_steps(args.out)}):
                measure(args, step, generate)
            if last_look:
                break
            time.sleep(args.every)
        if (best := save_curve(args)) is None:
            raise InputError(f"{args.run}: no checkpoint was measured; run this again when there is one")
    settings, kept = Settings.read(args.run), Path(args.out, "best.pt")
    there = kept.exists()  # not after a rewind behind the best step, if no later one was better
    print(f"best: step {best:,}; in {args.out}: curve.json, curve.png, {'best.pt' if there else 'no best.pt any more'}")
    prompts = " --prompts 'a dog'" * settings.is_text
    print(f"next: python {settings.program} --ckpt {kept if there else args.run}{prompts}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
