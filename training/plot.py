"""Curves of one or several runs as one PNG: a panel per logged quantity, a line per run, thin ones where it resumed.

python -m training.plot exps/b2 exps/sit-b2 --out curves.png
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error
from common.files import read_lines, write_atomically
from common.flags import flag, parse_flags, required
from training.logs import parse_line, resumed_steps

DRAWN = ("loss", "error_", "du_dt_norm", "log_variance", "grad_norm", "images_per_s")  # beginnings of names
COLUMNS = 3


@dataclasses.dataclass
class PlotFlags:
    """Flags of the command."""

    runs: list = required("folder of a run, or its log.jsonl", positional=True, nargs="+", metavar="RUN")
    out: str = flag("curves.png", "picture to write")


def read_curves(log):
    """JSONL log → {name: (steps, values)} of the names that are drawn. Raises InputError naming file and line."""
    curves = {}
    for number, line in read_lines(log):
        record = parse_line(line, f"{log}, line {number}")
        for name in (key for key in record if key.startswith(DRAWN)):
            steps, values = curves.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(record[name])
    if not any(name.startswith("loss") for name in curves):
        raise InputError(f"{log}: no line has a key that begins with 'loss'; pass the log.jsonl of a run")
    return curves


def save_curves(runs, path):
    """Write a PNG with the curves of the given run folders or logs. Raises InputError."""
    from matplotlib.figure import Figure  # a second to import, and only pictures need it

    logs = {str(run): Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run) for run in runs}
    curves = {run: read_curves(log) for run, log in logs.items()}
    resumed = {run: resumed_steps(log.parent) for run, log in logs.items()}
    names = list(dict.fromkeys(name for of_run in curves.values() for name in of_run))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows + 0.4), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place)
        for run, of_run in curves.items():
            (line,) = axes.plot(*of_run.get(name, ([], [])), label=run, linewidth=1)
            for step in resumed[run]:
                axes.axvline(step, color=line.get_color(), linewidth=0.3)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    if len(curves) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(argv=None):
    flags = parse_flags(PlotFlags, argv, description=__doc__)
    save_curves(flags.runs, flags.out)
    print(f"curves of {len(flags.runs)} runs: {flags.out}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
