"""Results as a markdown table, each model's followed by what its paper states for it.

python evaluations/table.py results/*.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

from common.errors import exit_on_input_error
from evaluations.metrics.published import PUBLISHED
from evaluations.metrics.results import read_result

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
ALWAYS = ("fid", "sfid", "inception_score")


def sampling(manifest):
    """How samples were made, in words: `sde, 250 steps, cfg 1.5 in [0.3, 0.7], ema`."""
    if not manifest:
        return "no manifest"
    scale, low, high = (manifest.get(key) for key in ("cfg_scale", "guidance_low", "guidance_high"))
    guidance = (
        f"cfg {scale}" + (f" in [{low}, {high}]" if (low, high) != (0.0, 1.0) else "") if is_guided(manifest) else ""
    )
    words = [
        manifest.get("mode"),
        f"{manifest.get('num_steps')} steps",
        guidance or "no guidance",
        manifest.get("weights"),
    ]
    return ", ".join(str(word) for word in words if word)


def is_guided(manifest):
    return manifest.get("cfg_scale", 1.0) != 1.0


def resolution(manifest):
    """Side of the images; None where the manifest does not say."""
    size, factor = (
        (manifest.get("model_options") or {}).get("input_size"),
        (manifest.get("latents") or {}).get("factor"),
    )
    return size * factor if size and factor else None


def measured_cells(path, result, metrics):
    manifest, numbers = result.get("manifest") or {}, result["metrics"]
    step = manifest.get("step")
    trained = f"{step} steps" if step is not None else ""
    count = f", {result['count']} images" if "count" in result else ""
    values = [f"{numbers[name]:.4g}" if name in numbers else "" for name in metrics]
    return [Path(path).stem, manifest.get("model") or "", trained, sampling(manifest) + count, *values]


def published_cells(row, metrics):
    values = [getattr(row, name, None) for name in metrics]
    details = [row.weighting and f"{row.weighting} t", row.alignment, "guided" if row.guided else "no guidance"]
    about = ", ".join([row.sampled, *filter(None, details)])
    return [
        "*paper*",
        row.model,
        f"{row.epochs} epochs" if row.epochs else f"{row.steps} steps",
        about,
        *("" if value is None else f"{value}" for value in values),
    ]


def counterparts(result):
    """Published rows of the same model, resolution and guidance."""
    manifest = result.get("manifest") or {}
    own = (manifest.get("model"), is_guided(manifest), resolution(manifest))
    return [row for row in PUBLISHED if (row.model, row.guided, row.resolution) == own]


def build_table(results):
    """Lines of the table of {path: result}; results with the same counterparts stand together."""
    names = [name for result in results.values() for name in result["metrics"]]
    names = [name for name in METRICS if name in (*ALWAYS, *names)] + sorted({*names} - {*METRICS})
    groups = {}
    for path, result in results.items():
        groups.setdefault(tuple(counterparts(result)), []).append(measured_cells(path, result, names))
    rows = [["result", "model", "trained", "sampled", *(METRICS.get(name, name) for name in names)]]
    rows.append(["---"] * len(rows[0]))
    for published, measured in groups.items():
        rows += measured + [published_cells(row, names) for row in published]
    return ["| " + " | ".join(row) + " |" for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", nargs="+", help="JSON files that the evaluators wrote")
    args = parser.parse_args(argv)
    print("\n".join(build_table({path: read_result(path) for path in args.results})))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
