"""Results as a markdown table, each model's followed by what its paper states for it.

python -m evaluations.table results/*.json
"""

import dataclasses
from pathlib import Path

from common.errors import exit_on_input_error
from common.flags import parse_flags, required
from evaluations.metrics.published import PUBLISHED
from evaluations.metrics.results import Result, markdown

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
ALWAYS = ("fid", "sfid", "inception_score")


@dataclasses.dataclass
class TableFlags:
    """Flags of this program."""

    results: list = required("JSON files that the evaluators wrote", positional=True, nargs="+")


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
    trained = f"{row.epochs} epochs" if row.epochs else f"{row.steps} steps"
    details = [row.weighting and f"{row.weighting} t", row.alignment, "guided" if row.guided else "no guidance"]
    values = [getattr(row, name, None) for name in metrics]
    sampled = ", ".join([row.sampled, *filter(None, details)])
    return ["*paper*", row.model, trained, sampled, *("" if value is None else value for value in values)]


def counterparts(result):
    """Published rows of the same model, resolution and guidance."""
    manifest = result.manifest or {}
    options, latents = manifest.get("model_options") or {}, manifest.get("latents") or {}
    resolution = options.get("input_size", 0) * latents.get("factor", 0)
    own = (manifest.get("model"), is_guided(manifest), resolution)
    return [row for row in PUBLISHED if (row.model, row.guided, row.resolution) == own]


def build_table(results):
    """Lines of the table of {path: Result}; results with the same counterparts stand together."""
    names = [name for result in results.values() for name in result.metrics]
    names = [name for name in METRICS if name in (*ALWAYS, *names)] + sorted({*names} - {*METRICS})
    groups = {}
    for path, result in results.items():
        groups.setdefault(tuple(counterparts(result)), []).append(measured_cells(path, result, names))
    rows = []
    for published, measured in groups.items():
        rows += measured + [published_cells(row, names) for row in published]
    return markdown(["result", "model", "trained", "sampled", *(METRICS.get(name, name) for name in names)], rows)


def main(argv=None):
    args = parse_flags(TableFlags, argv, __doc__)
    print("\n".join(build_table({path: Result.read(path) for path in args.results})))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
