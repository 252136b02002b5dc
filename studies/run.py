"""Train, sample and measure the unfinished runs of a study, then write tables and plots.

    python -m studies.run studies/digits_ladder.toml --jobs 2
    python -m studies.run studies/digits_ladder.toml --print > lines.txt

Start it from the repository's root. It can be killed and started again at any time: every run is an ordinary run folder
that is resumed, and finished parts are left alone. If a run fails, the others continue.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

from common.errors import EXIT_STOPPED, InputError, exit_on_input_error, note
from common.files import check_writable
from common.flags import WORKERS, Range, flag, parse_early, parse_flags, required
from models.gpus import MFU, PEAK_FLOPS, gpu_hours

OUTPUT = "study.txt"  # in the folder of a run: the output of its commands
run_flag, other_flag = (functools.partial(flag, group=group) for group in ("running", "instead of running"))


@dataclasses.dataclass(kw_only=True)
class StudyFlags:
    study: str = required("TOML file of the study", positional=True, metavar="FILE")
    out: str | None = run_flag(None, "folder of runs, table.md, results.json, plots; default: exps/NAME", str)
    jobs: int = run_flag(1, "runs side by side", range=WORKERS)
    known: tuple = run_flag(
        (), "results.json of other machines, for their finished runs", str, nargs="+", metavar="JSON"
    )
    report: bool = other_flag(False, "start nothing: table and plots of what is finished")
    print: bool = other_flag(False, "print the commands of each unfinished run on one line, and stop")
    hours_on: str | None = other_flag(
        None, "print the hours that runs not in --known train on one such GPU, and stop", str, choices=list(PEAK_FLOPS)
    )
    mfu: float = other_flag(MFU, "share of the GPU's peak that --hours-on assumes", range=Range(above=0, high=1))


if __name__ == "__main__":
    parse_early(StudyFlags, __doc__)

from common.look_ahead import ordered_map
from models.flops import flops_per_image
from models.presets import model_config
from studies.study import read_study
from studies.summary import read_known, summarise
from training.run import open_data


class Shell:
    """Runs shell lines in their own process groups: each is signalled once, by `stop`, whoever got the signal."""

    def __init__(self):
        self.processes, self.stopped = set(), False

    def run(self, line, output):
        """Run a line, appending its output to the file `output`; returns the exit code."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        options = {"shell": True, "start_new_session": True, "env": {**os.environ, "PATH": path}}
        line = f"trap 'exit {EXIT_STOPPED}' TERM; {line}"  # so that the shell waits while a program saves its work
        with open(output, "ab") as file:
            process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)
        self.processes.add(process)
        if self.stopped:  # by a signal that came before the process was known
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
        self.processes.discard(process)
        return code

    def stop(self, *_):
        """Signal handler: train*.py write a checkpoint and end."""
        self.stopped = True
        for process in list(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        raise KeyboardInterrupt


def finish(run, shell):
    """Run the unfinished stages of a Run; returns None, or a line that says what failed."""
    output = run.folder / OUTPUT
    for stage, line, check in run.unfinished():
        if shell.stopped:
            return "stopped"
        note(f"{run.name}: {stage}, output in {output}")
        output.parent.mkdir(parents=True, exist_ok=True)
        if code := shell.run(line, output):
            said = [line.strip() for line in output.read_text(errors="replace").splitlines()]
            return f"{stage} ended with {code}: {next(filter(None, reversed(said)), 'it printed nothing')}"
        try:
            check()
        except InputError as error:
            return f"{stage}: {error}"
    return None


def finish_all(runs, jobs):
    """Finish all runs, `jobs` side by side; returns {name: what failed}."""
    shell = Shell()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
            signal.signal(number, shell.stop)
    faults = ordered_map(lambda run: finish(run, shell), runs, ahead=len(runs), threads=jobs)
    return {run.name: fault for run, fault in zip(runs, faults, strict=True) if fault}


def training_flops(runs):
    """Training FLOPs of all runs; a run whose data are missing counts as one on ImageNet."""
    total = 0
    for run in runs:
        info = open_data(dataclasses.replace(run.config, dry_run=True))[0]
        options = model_config(run.config.model, **run.config.model_flags(), **info.model_options())
        total += flops_per_image(run.config, options) * run.config.batch_size * run.config.max_train_steps
    return total


def main(argv=None):
    flags = parse_flags(StudyFlags, argv, __doc__)
    out = Path(flags.out or Path("exps", Path(flags.study).stem))
    study, runs = read_study(flags.study, out)
    known = read_known(study, flags.known)
    missing = [run for run in runs if run.key not in known]
    if flags.hours_on:
        total = training_flops(missing)
        hours = f"{gpu_hours(total, 1, flags.hours_on, flags.mfu):.2g} hours on one {flags.hours_on}"
        print(f"{len(missing)} runs, {total:.3g} training FLOPs: {hours} at {100 * flags.mfu:g}% of its bf16 peak")
    for line in (" && ".join(line for _, line, _ in run.unfinished()) for run in missing if flags.print):
        print(line, end="\n" if line else "")
    if flags.hours_on or flags.print:
        return note(f"next: python -m studies.run {flags.study}{' --report' * flags.print}")
    check_writable(out / "table.md", "--out:")
    failed = {} if flags.report else finish_all(missing, flags.jobs)
    summarise(study, runs, out, failed, known)
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed, as listed above; mend them and start this again")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
