"""Agreement and Fréchet distance (digits/judge.py) of samples of digits, a picture of them, and a curve of the loss.

    python -m digits.report --samples samples/NAME.npz --out report.json --grid grid.png \\
        --curve exps/digits/log.jsonl curve.png
    python -m digits.report --samples "map, 1 step=samples/a.npz" "map, 4 steps=samples/b.npz" --grid rows.png

The manifest beside the samples lists the requested digits, or prompts that name them, under `labels`.
"""

import dataclasses

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.flags import flag, parse_early, parse_flags, required
from evaluations.metrics.results import CountedSamples, manifest_without_labels


@dataclasses.dataclass(kw_only=True)
class ReportFlags(CountedSamples):
    samples: list = required("npz, folder or zip of samples, or several as NAME=FILE", nargs="+", metavar="FILE")
    out: str | None = flag(None, "JSON file to write", str, also=["--json"], group="output")
    grid: str | None = flag(None, "image grid; for several files, a row each", str, group="output", metavar="PNG")
    curve: list | None = flag(None, "log to read, curve to write", str, group="output", nargs=2, metavar=("LOG", "PNG"))


if __name__ == "__main__":
    parse_early(ReportFlags, __doc__)

import numpy as np

from common.pictures import save_grid
from digits.captions import digit_of
from digits.data import CLASSES, RESOLUTION
from digits.judge import build_report
from evaluations.metrics.images import read_samples
from sampling.manifest import manifest_path
from training.plot import save_curves

COLUMNS = 10  # images per row
PER_CLASS = 2  # images per digit in each file's row
NAMES = [str(digit) for digit in range(CLASSES)]  # of rows or columns


def named(texts):
    """{name: file} of --samples; a single file is called `samples`. Raises InputError."""
    if len(texts) == 1:
        return {"samples": texts[0]}
    files = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(files) < len(texts):
        raise InputError("--samples: give several files as NAME=FILE, each with a different name")
    return files


def load_samples(args, path):
    """(images, uint8 (N, 32, 32, 3), their digits (N,), their prompts or None). Raises InputError naming the file.

    The digit of a sample is its label, or what its prompt names.
    """
    remedy = "make the samples with generate.py or generate_t2i.py"
    images, labels = read_samples(args, path, RESOLUTION, 2, list[int | str], remedy)
    digits = np.array([digit_of(str(label), f"{manifest_path(path)}: label") for label in labels])
    return images, digits, labels if isinstance(labels[0], str) else None


def class_grid(images, digits, columns):
    """uint8 (N, R, R, 3), digits (N,) → (10·columns, R, R, 3): the first of each digit, white if there are too few."""
    chosen = np.full((CLASSES, columns, *images.shape[1:]), 255, np.uint8)
    for digit in range(CLASSES):
        rows = images[digits == digit][:columns]
        chosen[digit, : len(rows)] = rows
    return chosen.reshape(-1, *images.shape[1:])


def in_words(report, of="samples"):
    """The two numbers of a report as text; of: "samples" or "held_out_digits"."""
    found = report["agreement"][of]
    return f"{found['agree']} of {found['of']} carry their label; Fréchet distance {report['frechet'][of]:.4f}"


def for_table(report, count):
    """The fields of a report, besides `samples`, that evaluations/table.py reads."""
    agreement, distance = report["agreement"]["samples"]["agree"] / count, report["frechet"]["samples"]
    metrics = {"label agreement": agreement, "Fréchet distance of digits": distance}
    return {"metrics": metrics, "count": count, "manifest": manifest_without_labels(report["samples"])}


def main(argv=None):
    args = parse_flags(ReportFlags, argv, __doc__)
    files = named(args.samples)
    loaded = {name: load_samples(args, path) for name, path in files.items()}
    if len({len(images) for images, _, _ in loaded.values()}) > 1:
        counts = ", ".join(f"{files[name]} {len(images)}" for name, (images, _, _) in loaded.items())
        raise InputError(f"--samples: the files hold different numbers of images ({counts}); sample equal numbers")
    reports = {}
    for name, (images, digits, _) in loaded.items():
        report = reports[name] = {"samples": files[name], **build_report(images, digits)}
        report |= for_table(report, len(images))
        print(f"{name}: {in_words(report)}")
    print(f"held-out digits: {in_words(report, 'held_out_digits')}")
    side = "{images_a_side} images a side, seed {seed}".format(**report["frechet"])
    print(f"(Fréchet distance to the training digits, {side})")
    if args.out:
        write_json(args.out, reports if len(files) > 1 else report)
    if args.grid and len(files) > 1:  # files with the same seed and labels share the noise of each column
        rows = [class_grid(images, digits, PER_CLASS) for images, digits, _ in loaded.values()]
        save_grid(np.concatenate(rows), CLASSES * PER_CLASS, args.grid, None, [[name] for name in loaded], NAMES)
    elif args.grid:
        ((images, digits, prompts),) = loaded.values()
        images, rows = (images, ()) if prompts else (class_grid(images, digits, COLUMNS), [[name] for name in NAMES])
        save_grid(images, COLUMNS, args.grid, prompts, rows)
    if args.curve:
        log, picture = args.curve
        save_curves([log], picture)
    if wrote := [path for path in (args.out, args.grid, args.curve and args.curve[1]) if path]:
        print(f"wrote {', '.join(wrote)}")
    if args.out:
        print(f"next: python -m evaluations.table {args.out}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
