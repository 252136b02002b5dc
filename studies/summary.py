"""Results of a study: means and standard errors over seeds, paired differences; as tables, JSON and plots."""

import collections
import dataclasses
import json
import re
from pathlib import Path
from statistics import fmean

from common.errors import InputError
from common.files import read_lines, write_atomically, write_json
from common.pictures import save_lines
from common.records import read_record
from common.versions import versions
from evaluations.metrics.results import Estimate, Result, markdown
from models import checkpoints
from models.flops import flops_per_image
from training.logs import parse_line
from training.plot import read_curves

COST = ("training FLOPs", "hours")  # columns that every study has


@dataclasses.dataclass
class Measured:
    """The numbers of a finished run."""

    variant: str
    axis: dict  # {its flag: value}; {} without one
    seed: int
    numbers: dict[str, float]  # {column of the tables: number}
    curves: dict[str, list[tuple[int, float, float]]]  # {field of the log: [(step, training FLOPs, number)]}
    by_time: dict[int, dict[float, float]] = dataclasses.field(default_factory=dict)  # {branch: {t: held-out error}}


@dataclasses.dataclass
class Results:
    """The content of results.json that is read again."""

    study: dict
    runs: list[Measured]


def errors_by_time(records, last):
    """{branch: {t: held-out error}} of averaged weights at the step `last`; {} if it was not measured there."""
    found = collections.defaultdict(dict)
    for record in (record for record in records if record["step"] == last):
        for name, error in record.items():
            if match := re.fullmatch(r"holdout_v(\d+)_t([\d.]+)", name):
                found[int(match[1])][float(match[2])] = error
    return dict(found)


def curve_of(records, field, last, every):
    """[(step, number)] of a field of log.jsonl's records, up to the step `last`; [] if there is none.

    A line is a mean over `every` steps; where a stop has split these, the means of the parts are combined. `*` stands
    for the largest number in the log: loss_v* is loss_v2 for a run with two branches.
    """
    pattern = re.compile(re.escape(field).replace(r"\*", r"(\d+)"))
    found = {tuple(map(int, match.groups())): name for r in records for name in r if (match := pattern.fullmatch(name))}
    name = found[max(found)] if found else None
    points, begin, end, total = [], 0, 0, 0.0
    for record in (record for record in records if name in record and record["step"] <= last):
        step, number = int(record["step"]), record[name]
        if "steps_per_s" in record:  # a mean over the steps since the previous line, not a value at this step
            total, end = total + (step - end) * number, step
            if step % every and step != last:
                continue
            number, total, begin = total / (step - begin), 0.0, step
        points.append((step, number))
    return points


def measured(run):
    """The Measured of a finished Run. Raises InputError if it is not finished, or its files are damaged."""
    for _, _, check in run.stages():
        check()
    log, last = run.folder / "log.jsonl", run.config.max_train_steps
    options = read_record(checkpoints.Run, run.folder / "config.json", "move the run away").model_options
    per_step = flops_per_image(run.config, options) * run.config.batch_size
    records = [parse_line(line, f"{log}, line {number}") for number, line in read_lines(log)]
    curves = {field: curve_of(records, field, last, run.config.log_every) for field in run.study.fields}
    if lost := [field for field, points in curves.items() if not points]:
        raise InputError(f"{log} has no field {lost[0]}; correct `fields` in the study file, or the flags that log it")
    numbers = {field: points[-1][1] for field, points in curves.items()}
    for measure, path in run.results.items():
        numbers |= {f"{measure}: {name}": number for name, number in Result.read(path).metrics.items()}
    numbers |= zip(COST, (per_step * last, read_curves(log, "hours")["step"][0][-1]), strict=True)
    curves = {field: [(step, step * per_step, number) for step, number in of] for field, of in curves.items()}
    axis = dict.fromkeys(run.study.axis, run.value)
    return Measured(run.variant, axis, run.seed, numbers, curves, errors_by_time(records, last))


def read_known(study, paths):
    """{(variant, axis value, seed): Measured} of results.json files. Raises InputError if one is of another study."""

    def compared(content):
        return {name: value for name, value in content.items() if name not in ("about", "seeds")}

    known, ours = {}, compared(json.loads(json.dumps(dataclasses.asdict(study))))
    for path in paths:
        results = read_record(Results, path, "name a results.json of studies.run")
        theirs = compared(results.study)
        if changed := [name for name in ours if theirs.get(name) != ours[name]]:
            raise InputError(f"--known {path}: its study has other {changed[0]}; leave it out, or undo the change")
        known |= {(run.variant, next(iter(run.axis.values()), None), run.seed): run for run in results.runs}
    return known


def rows_of(groups, columns, baseline=None):
    """[{variant, axis value, number of seeds, column: Estimate, …}] of {(variant, value): [Measured]}.

    baseline: estimate the differences from this variant instead, over pairs of the same axis value and seed.
    """
    rows = []
    for (variant, value), runs in groups.items():
        others = {run.seed: run.numbers for run in groups.get((baseline, value), [])}
        if baseline is None:
            others = {run.seed: dict.fromkeys(columns, 0) for run in runs}
        pairs = [(run.numbers, others[run.seed]) for run in runs if run.seed in others]
        if pairs and variant != baseline:
            found = {
                column: Estimate.of([ours[column] - theirs[column] for ours, theirs in pairs]) for column in columns
            }
            rows.append({"variant": variant, **runs[0].axis, "seeds": len(pairs), **found})
    return rows


def at_best(groups, field):
    """{(variant, None): its runs at the axis value with the lowest mean of a field}."""
    order = sorted(groups, key=lambda key: fmean(run.numbers[field] for run in groups[key]), reverse=True)
    best = {variant: groups[variant, value] for variant, value in order}
    return {(variant, None): best[variant] for variant, _ in groups}


def mean_curve(curves):
    """[(x, mean, standard error)] of one {x: number} per seed, at the x that all share; empty ones are left out."""
    curves = [curve for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    means = [Estimate.of([curve[x] for curve in curves]) for x in shared]
    return [(x, of.mean, of.error or 0) for x, of in zip(shared, means, strict=True)]


def last_branch(run):
    """{t: held-out error} of a Measured's final branch; {} if it was not measured."""
    return run.by_time[max(run.by_time)] if run.by_time else {}


def less(ours, theirs):
    """{t: difference} of two {t: error}."""
    return {t: ours[t] - theirs[t] for t in ours.keys() & theirs.keys()}


def lines_by_time(groups, baseline):
    """({variant: its final branch's held-out error over t less the baseline's}, {variant: less its first branch's}).

    groups: {variant: [Measured]}.
    """
    others = {run.seed: last_branch(run) for run in groups.get(baseline, [])}
    from_baseline, from_first = {}, {}
    for variant, runs in groups.items():
        paired = [run for run in runs if run.seed in others and variant != baseline]
        from_baseline[variant] = mean_curve([less(last_branch(run), others[run.seed]) for run in paired])
        deep = [run for run in runs if len(run.by_time) > 1]
        from_first[variant] = mean_curve([less(last_branch(run), run.by_time[1]) for run in deep])
    return from_baseline, from_first


def save_plots(study, groups, rows, columns, out):
    """Write PNGs: each field over steps and FLOPs, one per axis value; each column over the axis.

    Bands are standard errors.
    """

    def save(lines, y, x, of="", **axes):
        if lines := {label: points for label, points in lines.items() if points}:
            name = re.sub(r"[^\w.-]+", "-", f"{y} over {x} {of}").strip("-")
            save_lines(lines, Path(out, f"{name}.png"), xlabel=x, ylabel=y, title=of, **axes)

    axis = next(iter(study.axis), None)
    for value in dict.fromkeys(value for _, value in groups):
        of = f"{axis} {value}" if axis else ""
        at_value = {variant: runs for (variant, at), runs in groups.items() if at == value}
        for field in study.fields:
            over_steps, over_flops = {}, {}
            for variant, runs in at_value.items():
                flops = {step: flops for step, flops, _ in runs[0].curves[field]}
                curves = [{step: number for step, _, number in run.curves[field]} for run in runs]
                over_steps[variant] = mean_curve(curves)
                over_flops[variant] = [(flops[step], *rest) for step, *rest in over_steps[variant]]
            save(over_steps, field, "steps", of)
            save(over_flops, field, "training FLOPs", of)
        from_baseline, from_first = lines_by_time(at_value, study.baseline)
        save(from_baseline, f"held-out error, final branch less {study.baseline}", "t", of, marker="o")
        save(from_first, "held-out error, final branch less first branch", "t", of, marker="o")
    if axis and all(isinstance(row[axis], int | float) and row[axis] > 0 for row in rows):
        for column in (column for column in columns if column not in COST):
            lines = collections.defaultdict(list)
            for row in rows:
                lines[row["variant"]].append((row[axis], row[column].mean, row[column].error or 0))
            save(lines, column, axis, marker="o", xscale="log")


def summarise(study, runs, out, failed, known):
    """Print a table, and write table.md, results.json and plots of the finished runs into `out`.

    failed: {name of a run: what failed}; known: {key of a run: Measured} of runs that are not in `out`.
    """
    groups, missing = collections.defaultdict(list), {}
    for run in runs:
        try:
            found = known.get(run.key) or measured(run)
        except InputError as error:
            missing[run.name] = failed.get(run.name, str(error))
        else:
            groups[run.variant, run.value].append(found)
    done = [run for of in groups.values() for run in of]
    columns = [name for name in (done[0].numbers if done else ()) if all(name in run.numbers for run in done)]
    tables = {
        "Mean ± standard error over seeds": (rows := rows_of(groups, columns)),
        f"Difference from {study.baseline} with the same seed": rows_of(groups, columns, study.baseline),
    }
    for axis in study.axis if done else ():
        best, at = at_best(groups, study.fields[0]), f"at the {axis} with the lowest {study.fields[0]}"
        tables[f"Each variant {at}"] = rows_of(best, columns)
        tables[f"Difference from {study.baseline}, each {at}"] = rows_of(best, columns, study.baseline)
    parts = [
        f"{title}:\n\n{markdown(found[0], [row.values() for row in found])}" for title, found in tables.items() if found
    ]
    parts += ["Not finished:\n\n" + "\n".join(f"- {name}: {why}" for name, why in missing.items())] if missing else []
    text = "\n\n".join([*filter(None, [study.about.strip()]), *parts])
    save_plots(study, groups, rows, columns, out)
    content = {"study": study, "runs": done, "tables": tables, "not finished": missing, "versions": versions("torch")}
    write_json(out / "results.json", json.loads(json.dumps(content, default=vars)))
    write_atomically(out / "table.md", lambda file: file.write(f"{text}\n".encode()))
    print(f"{text}\n\nin {out}: table.md, results.json, plots\nnext: python -m training.plot {out}/*/log.jsonl")
