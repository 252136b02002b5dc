"""Results as a markdown table, each followed by what its paper states for the same model, training and sampling.

    python -m evaluations.table results/*.json
    python -m evaluations.table results/*.json --sort fid --csv results.csv
    python -m evaluations.table results/*.json --plot-epochs epochs.png --plot-parameters parameters.png

A published row belongs to a result that differs from it in nothing that both state; what one of them does not state
(the sampler of the guided rows, the training of a published file) is not compared.
"""

import collections
import csv
import dataclasses
import functools
import io
import math
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, write_atomically
from common.flags import BLOCKS, flag, parse_early, parse_flags, required, shown
from common.records import check_record, read_record

output_flag = functools.partial(flag, group="output")


@dataclasses.dataclass
class TableFlags:
    results: list = required("JSON files that the evaluators, or digits.report, wrote", positional=True, nargs="+")
    sort: str | None = output_flag(None, "sort by this metric, best first; named as in the files or the table", str)
    csv: str | None = output_flag(None, "write the table to this file, with all digits", str, metavar="FILE")
    plot_epochs: str | None = output_flag(None, "draw FID over epochs, a line per run (Figure 1)", str, metavar="PNG")
    plot_parameters: str | None = output_flag(None, "draw FID over parameters (Figure 2e)", str, metavar="PNG")


if __name__ == "__main__":
    parse_early(TableFlags, __doc__)

import torch

from common.pictures import save_lines
from evaluations.metrics.results import Result, is_better, markdown
from evaluations.published import PUBLISHED, STEPS_PER_EPOCH
from models.presets import IMAGENET, build, constructor_defaults, kind_of
from models.specs import LatentSpec
from sampling.manifest import SampleManifest
from training.settings import settings

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
METRICS |= {"kid": "KID", "kid_standard_error": "KID s.e."}
ALWAYS = ("fid", "sfid", "inception_score")
FREE = ("legacy_scaling", "projector_dim", "init", "encoder_depth")  # of a model: the papers do not state them
UNSTATED = ("seed", "mixed_precision", "holdout")  # of a run: likewise
REMEDY = "pass files that the evaluators or digits.report wrote"
UNUSUAL = (LookupError, ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError)  # of unusual settings
UNSAID = ("model", "max_train_steps", "resolution", "data_dir", "init_from")  # flags that the table shows otherwise


def made(result):
    """Describe what was measured: `sde, 250 steps, cfg 1.5 in [0.3, 0.7], cfg exit 1, ema, 50000 images`."""
    manifest, words = result.manifest, ["no manifest"]
    if manifest:
        interval = [manifest.guidance_low, manifest.guidance_high]
        guidance = f"cfg {manifest.cfg_scale}{f' in {interval}' if interval != [0.0, 1.0] else ''}"
        guidance = guidance if is_guided(manifest) else "no guidance"
        branches = [f"{name.replace('_', ' ')} {value}" for name, value in manifest.branch_settings().items()]
        labels = manifest.label_mode not in (None, "random", "prompts") and f"labels {manifest.label_mode}"
        shift = manifest.shift not in (None, 1.0) and f"shift {manifest.shift}"
        sampler = f"{manifest.mode}{' with heun' * bool(manifest.heun)}"
        words = [sampler, f"{manifest.num_steps} steps", shift, guidance, *branches, labels, manifest.weights]
    words += [result.count is not None and f"{result.count} images"]
    words += [result.reference and f"against {Path(result.reference).name}"]
    return ", ".join(filter(None, words))


def is_guided(manifest):
    return manifest.cfg_scale not in (None, 1.0)


def measured_cells(name, result, metrics, form):
    manifest = result.manifest or SampleManifest()
    trained = f"{manifest.step} steps" if manifest.step is not None else ""
    values = [format(result.metrics[metric], form) if metric in result.metrics else "" for metric in metrics]
    return [name, manifest.model or "", trained, made(result), *values]


def published_cells(row, metrics):
    sampler = row.sampler or {}
    sampled = [sampler.get("mode"), f"{sampler['num_steps']} steps"] if sampler else ["sampler not stated"]
    sampled.append({True: "guided", False: "no guidance", None: "guidance not stated"}[row.guided])
    words = [*filter(None, sampled), *row.words(without=UNSAID)]
    cells = [f"*paper, {row.title}*", row.name, f"{row.steps} steps", ", ".join(words)]
    return [*cells, *(row.numbers.get(name, "") for name in metrics)]


def network(options):
    """Constructor arguments as they are compared; those that an older file lacks have their defaults."""
    known = {**constructor_defaults(kind_of(options)), **options}
    known = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items() if name not in FREE}
    return {**known, "qk_norm": bool(known["qk_norm"]), "z_dims": known["z_dims"] if known["ssl_align"] else None}


def is_counterpart(row, result):
    """Whether a published row is about what a result is about."""
    manifest, spec = result.manifest or SampleManifest(), dataclasses.asdict(LatentSpec())
    options, latents, run = manifest.model_options or {}, manifest.latents or {}, dict(manifest.training or {})
    if not options or not row.numbers.keys() & result.metrics.keys() or network(options) != network(row.options):
        return False
    started = run.pop("init_from", None)
    known = {name: v for name, v in run.items() if hasattr(row.config, name) and name not in UNSTATED}
    config = dataclasses.replace(row.config, **known)
    step, sampler = manifest.step, row.sampler or {}
    try:
        same = settings(config, row.options) == settings(row.config, row.options)
    except UNUSUAL:
        return False
    return (
        same
        and not run.get("changes")  # of settings, in the middle of the run
        and (row.config.init_from or not started)
        and (step is None or abs(step - row.steps) <= 0.01 * row.steps)
        and all(latents.get(name, spec[name]) == spec[name] for name in ("family", "factor", "scale"))
        and manifest.path_type in (None, row.config.path_type)
        and (row.kind == "text" or manifest.weights in (None, "ema"))  # REPA's text-to-image sampler has raw ones
        and row.guided in (None, is_guided(manifest))
        and not manifest.branch_settings()
        and all(getattr(manifest, name) == value for name, value in sampler.items())
    )


def counterparts(result):
    """Published rows about what a result is about; what several tables print is taken once, from the fullest."""
    found = []
    for row in sorted(PUBLISHED, key=lambda row: -len(row.numbers)):
        known = any(row.config == other.config and row.numbers.items() <= other.numbers.items() for other in found)
        found += [row] if not known and is_counterpart(row, result) else []
    return found


def sort_results(results, metric):
    """{name: Result} sorted by a metric, best first; results without it come last. Names as in the table or the files.

    Raises InputError if no result has it.
    """
    known = {name for result in results.values() for name in result.metrics}
    metric = {title: name for name, title in METRICS.items()}.get(metric, metric)
    if metric not in known:
        raise InputError(f"--sort {metric}: no result has it; choose one of {', '.join(sorted(known))}")
    direction = 1 if is_better(metric, 0, 1) else -1
    order = {name: direction * result.metrics.get(metric, direction * math.inf) for name, result in results.items()}
    return {name: results[name] for name in sorted(results, key=order.get)}


def build_rows(results, form=".4g"):
    """(column names, rows of text) for {name: Result}; results with the same counterparts are grouped."""
    names = [name for result in results.values() for name in result.metrics]
    names = [name for name in METRICS if name in (*ALWAYS, *names)] + sorted({*names} - {*METRICS})
    groups = {}
    for name, result in results.items():
        groups.setdefault(tuple(counterparts(result)), []).append(measured_cells(name, result, names, form))
    rows = []
    for published, measured in groups.items():
        rows += measured + [published_cells(row, names) for row in published]
        rows += [] if published else [["*no published row*", *[""] * (3 + len(names))]]
    return ["result", "model", "trained", "sampled", *(METRICS.get(name, name) for name in names)], rows


def build_table(results):
    """Markdown table of {name: Result}."""
    return markdown(*build_rows(results))


def write_csv(results, path):
    """Write the table as CSV, with all digits and without the rows *no published row*."""
    header, rows = build_rows(results, "")
    text = io.StringIO(newline="")
    rows = [[row[0].strip("*"), *row[1:]] for row in rows if any(row[1:])]
    csv.writer(text).writerows([header, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def epochs(manifest):
    """Epochs of ImageNet that the model behind the samples was trained for; None if unknown."""
    batch = (manifest.training or {}).get("batch_size")
    return manifest.step * batch / IMAGENET["count"] if manifest.step and isinstance(batch, int) else None


def parameters(manifest):
    """Millions of parameters of the model behind the samples; None if unknown."""
    options = manifest.model_options or {}
    try:
        with torch.device("meta"):
            known = options["depth"] in BLOCKS  # building others could take too long
            return sum(parameter.numel() for parameter in build(options).parameters()) / 1e6 if known else None
    except UNUSUAL:
        return None


def curves(results, table, of_row, of_manifest):
    """{label: [(x, FID)]}: rows of a published table, and the results without guidance, a line per run and sampler."""
    lines = collections.defaultdict(list)
    for row in (row for row in PUBLISHED if row.table == table):
        lines[f"paper: {row.name}"].append((of_row(row), row.numbers["fid"]))
    for name, result in results.items():
        manifest = result.manifest or SampleManifest()
        where = of_manifest(manifest)
        if "fid" not in result.metrics or is_guided(manifest) or manifest.branch_settings() or where is None:
            note(f"{name} is not drawn: no FID without guidance of a model whose size, steps and batch are known")
        else:
            lines[f"{manifest.run or name}: {made(result)}"].append((where, result.metrics["fid"]))
    return {label: sorted(points) for label, points in lines.items()}


PLOTS = {  # {flag: (published table, x of a row, x of a result, what x is)}
    "plot_epochs": ("3", lambda row: row.steps / STEPS_PER_EPOCH, epochs, "epochs"),
    "plot_parameters": ("8", lambda row: row.size[0], parameters, "parameters (M)"),
}


def read_results(paths):
    """{name: Result}: of its file, with the path where files share a name; "NAME of FILE" for a report of several."""
    results, names = {}, collections.Counter(Path(path).name for path in {*paths})
    for path in paths:
        file = (Path(path).name if names[Path(path).name] == 1 else str(path)).removesuffix(".json")
        content = read_record(dict, path, REMEDY)
        if content and all(isinstance(part, dict) and "metrics" in part for part in content.values()):
            found = {name: check_record(Result, part, f"{path}: {name}", REMEDY) for name, part in content.items()}
            results |= {f"{name} of {file}": result for name, result in found.items()}
        else:
            results[file] = Result.read(path, REMEDY)
    return results


def main(argv=None):
    args = parse_flags(TableFlags, argv, __doc__)
    results = read_results(args.results)
    results = sort_results(results, args.sort) if args.sort else results
    for name in (name for name in ("csv", *PLOTS) if getattr(args, name)):
        check_writable(getattr(args, name), shown(name))
    for name, (table, of_row, x, label) in PLOTS.items():
        if path := getattr(args, name):
            save_lines(curves(results, table, of_row, x), path, marker="o", xlabel=label, ylabel="FID")
    if args.csv:
        write_csv(results, args.csv)
    print(build_table(results))
    for path in filter(None, [args.csv, *(getattr(args, name) for name in PLOTS)]):
        note(f"wrote {path}")
    if not args.csv:
        note("next: --csv FILE keeps the table")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
