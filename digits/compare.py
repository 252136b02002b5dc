"""Samplings of the handwritten digits side by side: label agreement and Fréchet distance of each, and a picture.

    python evaluations/digits_compare.py --samples "map, 1 step=samples/a.npz" "map, 4 steps=samples/b.npz" \\
        --out report.json --picture rows.png

The two numbers are those of digits_report.py. The picture has a row per sampling, in the order given: the first two
images of every class, which are the same noises in every row where the samplings share seed and labels.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.pictures import class_grid, enlarge_and_frame, save_grid
from digits.data import CLASSES
from digits.report import build_report, load_labels, load_samples

PER_CLASS = 2


def named_file(text):
    """`NAME=FILE` → (name, file)."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=FILE")
    return name, path


def measure(samples):
    """[(name, images, labels, report)] of [(name, file)]. Raises InputError."""
    rows = []
    for name, path in samples:
        images = load_samples(path)
        labels = load_labels(path, len(images))
        rows.append((name, images, labels, build_report(images, labels)))
    return rows


def summary(report):
    """The numbers of one sampling, JSON-like."""
    agreement = report["agreement"]["samples"]
    return {
        "agree": agreement["agree"],
        "of": agreement["of"],
        "agreement": agreement["agree"] / agreement["of"],
        "frechet": report["frechet"]["samples"],
    }


def save_rows(rows, path):
    """Write a PNG with one row of digits per sampling."""
    pictures = [class_grid(images, labels, CLASSES, PER_CLASS) for _, images, labels, _ in rows]
    save_grid(enlarge_and_frame(np.concatenate(pictures)), CLASSES * PER_CLASS, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", required=True, nargs="+", type=named_file, metavar="NAME=FILE", help="npz files")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--picture", metavar="PNG", help="picture to write: a row of digits per file")
    args = parser.parse_args(argv)
    if len({name for name, _ in args.samples}) < len(args.samples):
        raise InputError("--samples: every file needs a name of its own")
    rows = measure(args.samples)
    width = max(len(name) for name, _ in args.samples)
    for name, _, _, report in rows:
        s = summary(report)
        print(f"{name:{width}s}  {s['agree']:4d} of {s['of']} carry their label  Fréchet distance {s['frechet']:.4f}")
    if args.out:
        write_json(
            args.out, {name: {"samples": path, **summary(rows[i][3])} for i, (name, path) in enumerate(args.samples)}
        )
    if args.picture:
        save_rows(rows, args.picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
