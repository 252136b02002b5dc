"""Curves of one or more runs in a PNG: one panel per logged quantity, one line per run, thin lines where it resumed.

python -m training.plot exps/b2 exps/sit-b2 --out curves.png --x epoch --smooth 10 --log-axis
"""

import dataclasses
import functools
import re
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import read_lines, write_atomically
from common.flags import Range, flag, parse_early, parse_flags, required

axis_flag = functools.partial(flag, group="axes")


@dataclasses.dataclass
class PlotFlags:
    """Flags of the command."""

    runs: list = required("folder of a run, or its log.jsonl", positional=True, nargs="+", metavar="RUN")
    out: str = flag("curves.png", "picture to write", group="output")
    x: str = axis_flag("step", "horizontal axis; hours exclude pauses between runs", choices=["step", "epoch", "hours"])
    smooth: int = axis_flag(1, "average over this many log lines; held-out errors are not smoothed", range=Range(low=1))
    log_axis: bool = axis_flag(False, "logarithmic vertical axes for panels with only positive values")


if __name__ == "__main__":
    parse_early(PlotFlags, __doc__)

import numpy as np

from training.logs import parse_line, resumed_steps

FINAL = "loss_v, final"  # of the last branch, whatever its number
HELD_OUT = "held-out v, final"  # likewise
DRAWN = (  # prefixes, in this order
    *("held-out", "loss_v", "loss_a", "loss", "error_"),
    *("du_dt_norm", "log_variance", "grad_norm", "images_per_s"),
)
COLUMNS = 3
FEW = 30  # curves with at most this many points get markers


def read_curves(log, x="step"):
    """JSONL log → {name: (positions on the axis x, values)} of the names to draw, in the log's order, and of `step`.

    Raises InputError naming file and line.
    """
    curves, hours, before = {}, 0, 0
    for number, line in read_lines(log):
        record = parse_line(line, f"{log}, line {number}")
        step = record["step"]
        if speed := record.get("steps_per_s"):
            hours, before = hours + (step - before) / speed / 3600, step
        place = {"hours": hours, **record}.get(x)
        if place is None:
            raise InputError(f"{log}, line {number}: '{x}' is missing; leave --x {x} out")
        for key, value in record.items():
            name = re.sub(r"^holdout_(?=(v\d+|error_\w+)$)", "held-out ", key)  # of averaged weights, over all times
            if name == "step" or name.startswith(DRAWN):
                places, values = curves.setdefault(name, ([], []))
                places.append(place)
                values.append(value)
    for begin, final in (("loss_v", FINAL), ("held-out v", HELD_OUT)):
        if velocities := [name for name in curves if re.fullmatch(rf"{begin}\d+", name)]:
            curves[final] = curves.pop(max(velocities, key=panel_order))
    for name in [name for name in curves if re.fullmatch(r"held-out v\d+", name)]:
        del curves[name]
    if not any(name.startswith("loss") for name in curves):
        raise InputError(f"{log}: no line has a key that begins with 'loss'; pass the log.jsonl of a run")
    return curves


def panel_order(name):
    """Sort key of a curve: the total loss, the final velocity's losses, then as in DRAWN; branches by number."""
    word, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
    group = next(place for place, begin in enumerate(DRAWN) if name.startswith(begin))
    return name != "loss", name != FINAL, name != HELD_OUT, group, word, int(number or 0)


def smoothed(values, count):
    """Mean of each value and the count − 1 before it (fewer at the start)."""
    return [np.mean(values[max(0, end - count) : end]) for end in range(1, len(values) + 1)]


def named(runs):
    """{name: log.jsonl} of run folders or logs. The name is the folder's, or the log's path if several share that."""
    logs = [Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run) for run in dict.fromkeys(map(str, runs))]
    names = [log.resolve().parent.name for log in logs]
    return {name if names.count(name) == 1 else str(log): log for name, log in zip(names, logs, strict=True)}


def save_curves(runs, path, x="step", smooth=1, log_axis=False):
    """Write a PNG with the curves of the given run folders or logs. Raises InputError."""
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    logs = named(runs)
    curves = {run: read_curves(log, x) for run, log in logs.items()}
    resumed = {run: np.interp(resumed_steps(log.parent), *curves[run]["step"][::-1]) for run, log in logs.items()}
    names = sorted({name for of_run in curves.values() for name in of_run} - {"step"}, key=panel_order)
    columns = min(COLUMNS, len(names))
    rows, label = -(-len(names) // columns), "hours of training" if x == "hours" else x
    figure = Figure(figsize=(4 * columns, 2.8 * rows + 0.7), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place)
        for run, of_run in curves.items():
            places, values = of_run.get(name, ([], []))
            marker = "." if len(values) <= FEW else None
            count = 1 if name.startswith("held-out") else smooth  # few, and always on the same images
            (line,) = axes.plot(places, smoothed(values, count), label=run, linewidth=1, marker=marker)
            for start in resumed[run]:
                axes.axvline(start, color=line.get_color(), linewidth=0.3)
        positive = all(value > 0 for of_run in curves.values() for value in of_run.get(name, ([], []))[1])
        axes.set(title=name, xlabel=label, yscale="log" if log_axis and positive else "linear")
        axes.grid(alpha=0.3, which="both")
    figure.suptitle("Training curves" + f", means of {smooth} log lines" * (smooth > 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    flags = parse_flags(PlotFlags, argv, description=__doc__)
    save_curves(flags.runs, flags.out, flags.x, flags.smooth, flags.log_axis)
    print(f"curves of {len(flags.runs)} runs: {flags.out}\nnext: python -m evaluations.table results/*.json")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
