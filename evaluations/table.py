"""Results as a markdown table, each followed by what its paper states for the same model, training and sampling.

    python -m evaluations.table results/*.json
    python -m evaluations.table results/*.json --plot-epochs epochs.png --plot-parameters parameters.png

A published row belongs to a result that differs from it in nothing that both state; what one of them does not state
(the sampler of the guided rows, the training of a published file) is not compared.
"""

import collections
import dataclasses
from pathlib import Path

import torch

from common.errors import exit_on_input_error, note
from common.files import check_writable
from common.flags import flag, parse_flags, required, shown
from common.pictures import save_lines
from evaluations.metrics.results import Result, markdown
from evaluations.published import PUBLISHED, STEPS_PER_EPOCH
from models.codec import LatentSpec
from models.presets import IMAGENET, NETWORKS, build, constructor_defaults, kind_of
from training.settings import settings

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
ALWAYS = ("fid", "sfid", "inception_score")
FREE = ("legacy_scaling", "projector_dim", "init", "encoder_depth")  # of a model: the papers do not state them
UNSAID = ("model", "max_train_steps", "resolution", "data_dir", "pretrained")  # flags that the table shows otherwise


@dataclasses.dataclass
class TableFlags:
    results: list = required("JSON files that the evaluators wrote", positional=True, nargs="+")
    plot_epochs: str | None = flag(None, "draw FID over epochs, a line per run (Figure 1)", str, metavar="PNG")
    plot_parameters: str | None = flag(None, "draw FID over parameters (Figure 2e)", str, metavar="PNG")


def sampling(manifest):
    """How samples were made, in words: `sde, 250 steps, cfg 1.5 in [0.3, 0.7], ema`."""
    if not manifest:
        return "no manifest"
    guidance = "no guidance"
    if is_guided(manifest):
        low, high = manifest.get("guidance_low"), manifest.get("guidance_high")
        guidance = f"cfg {manifest['cfg_scale']}" + (f" in [{low}, {high}]" if (low, high) != (0.0, 1.0) else "")
    words = (manifest.get("mode"), f"{manifest.get('num_steps')} steps", guidance, manifest.get("weights"))
    return ", ".join(str(word) for word in words if word)


def is_guided(manifest):
    return manifest.get("cfg_scale") not in (None, 1.0)


def measured_cells(path, result, metrics):
    manifest = result.manifest or {}
    step = manifest.get("step")
    trained = f"{step} steps" if step is not None else ""
    count = f", {result.count} images" if result.count is not None else ""
    values = [f"{result.metrics[name]:.4g}" if name in result.metrics else "" for name in metrics]
    return [Path(path).stem, manifest.get("model") or "", trained, sampling(manifest) + count, *values]


def published_cells(row, metrics):
    sampler = row.sampler or {}
    sampled = [sampler.get("mode"), f"{sampler['num_steps']} steps"] if sampler else ["sampler not stated"]
    sampled.append({True: "guided", False: "no guidance", None: "guidance not stated"}[row.guided])
    words = [*filter(None, sampled), *row.words(without=UNSAID)]
    cells = [f"*paper, {row.title}*", row.name, f"{row.steps} steps", ", ".join(words)]
    return [*cells, *(row.numbers.get(name, "") for name in metrics)]


def network(options):
    """Constructor arguments as they are compared; those that an older file lacks have their defaults."""
    known = {**constructor_defaults(NETWORKS[kind_of(options)]), **options}
    known = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items() if name not in FREE}
    return {**known, "qk_norm": bool(known["qk_norm"]), "z_dims": known["z_dims"] if known["ssl_align"] else None}


def is_counterpart(row, result):
    """Whether a published row is about what a result is about."""
    manifest, spec = result.manifest or {}, dataclasses.asdict(LatentSpec())
    options, latents, run = (manifest.get(name) or {} for name in ("model_options", "latents", "training"))
    if not options or not row.numbers.keys() & result.metrics.keys() or network(options) != network(row.options):
        return False
    config = dataclasses.replace(row.config, **{name: v for name, v in run.items() if hasattr(row.config, name)})
    step, sampler = manifest.get("step"), row.sampler or {}
    return (
        settings(config, row.options) == settings(row.config, row.options)
        and not run.get("changes")  # of settings, in the middle of the run
        and (step is None or abs(step - row.steps) <= 0.01 * row.steps)
        and all(latents.get(name, spec[name]) == spec[name] for name in ("family", "factor"))
        and row.guided in (None, is_guided(manifest))
        and all(manifest.get(name) == value for name, value in sampler.items())
    )


def counterparts(result):
    """Published rows about what a result is about; what several tables print is taken once, from the fullest."""
    found = []
    for row in sorted(PUBLISHED, key=lambda row: -len(row.numbers)):
        known = any(row.config == other.config and row.numbers.items() <= other.numbers.items() for other in found)
        found += [row] if not known and is_counterpart(row, result) else []
    return found


def build_table(results):
    """Markdown table of {path: Result}; results with the same counterparts are grouped."""
    names = [name for result in results.values() for name in result.metrics]
    names = [name for name in METRICS if name in (*ALWAYS, *names)] + sorted({*names} - {*METRICS})
    groups = {}
    for path, result in results.items():
        groups.setdefault(tuple(counterparts(result)), []).append(measured_cells(path, result, names))
    rows = []
    for published, measured in groups.items():
        rows += measured + [published_cells(row, names) for row in published]
        rows += [] if published else [["*no published row*", *[""] * (3 + len(names))]]
    return markdown(["result", "model", "trained", "sampled", *(METRICS.get(name, name) for name in names)], rows)


def epochs(manifest):
    """Epochs of ImageNet that the model behind the samples was trained for; None if unknown."""
    step, batch = manifest.get("step"), (manifest.get("training") or {}).get("batch_size")
    return step and batch and step * batch / IMAGENET["count"]


def parameters(manifest):
    """Millions of parameters of the model behind the samples; None if unknown."""
    options = manifest.get("model_options")
    with torch.device("meta"):
        return options and sum(parameter.numel() for parameter in build(options).parameters()) / 1e6


def curves(results, table, of_row, of_manifest):
    """{label: [(x, FID)]}: rows of a published table, and one line per run of the results without guidance."""
    lines = collections.defaultdict(list)
    for row in (row for row in PUBLISHED if row.table == table):
        lines[f"paper: {row.name}"].append((of_row(row), row.numbers["fid"]))
    for path, result in results.items():
        manifest = result.manifest or {}
        where = of_manifest(manifest)
        if "fid" not in result.metrics or is_guided(manifest) or where is None:
            note(f"{path} is not drawn: no FID without guidance of a model whose size, steps and batch are known")
        else:
            lines[f"here: {manifest.get('run') or Path(path).stem}"].append((where, result.metrics["fid"]))
    return {label: sorted(points) for label, points in lines.items()}


PLOTS = {  # {flag: (published table, x of a row, x of a result, what x is)}
    "plot_epochs": ("3", lambda row: row.steps / STEPS_PER_EPOCH, epochs, "epochs"),
    "plot_parameters": ("8", lambda row: row.size[0], parameters, "parameters (M)"),
}


def main(argv=None):
    args = parse_flags(TableFlags, argv, __doc__)
    results = {path: Result.read(path) for path in args.results}
    for name, (table, of_row, x, label) in PLOTS.items():
        if path := getattr(args, name):
            check_writable(path, shown(name))
            save_lines(curves(results, table, of_row, x), path, marker="o", xlabel=label, ylabel="FID")
    print(build_table(results))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
