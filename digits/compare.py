"""Samplings of the handwritten digits side by side: label agreement and Fréchet distance of each, and a picture.

    python -m digits.compare --samples "map, 1 step=samples/a.npz" "map, 4 steps=samples/b.npz" \\
        --out report.json --picture rows.png

The two numbers are those of digits/judge.py. The picture has a row per sampling, in the order given: the first two
images of every class, which are the same noises in every row where the samplings share seed and labels.
"""

import dataclasses

import numpy as np

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.flags import FlagTextError, flag, parse_flags, required
from common.pictures import save_grid
from digits.data import CLASSES
from digits.judge import build_report, load_samples
from digits.pictures import class_grid, enlarge_and_frame
from digits.report import load_labels

PER_CLASS = 2


def named_file(text):
    """`NAME=FILE` → (name, file)."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise FlagTextError(f"{text!r} is not of the form NAME=FILE")
    return name, path


@dataclasses.dataclass(kw_only=True)
class CompareFlags:
    """Flags of this program."""

    samples: list = required("npz files", named_file, nargs="+", metavar="NAME=FILE")
    out: str | None = flag(None, "JSON file to write", str, group="output")
    picture: str | None = flag(None, "picture to write: a row of digits per file", str, group="output", metavar="PNG")


def summary(path, images, labels):
    """The numbers of one sampling, JSON-like."""
    report = build_report(images, labels)
    agree, of = (report["agreement"]["samples"][name] for name in ("agree", "of"))
    return {"samples": path, "agree": agree, "of": of, "agreement": agree / of, "frechet": report["frechet"]["samples"]}


def main(argv=None):
    args = parse_flags(CompareFlags, argv, __doc__)
    names, found, pictures = [name for name, _ in args.samples], {}, []
    if len(set(names)) < len(names):
        raise InputError("--samples: every file needs a name of its own")
    for name, path in args.samples:
        images = load_samples(path)
        labels = load_labels(path, len(images))
        row = found[name] = summary(path, images, labels)
        pictures.append(class_grid(images, labels, CLASSES, PER_CLASS))
        numbers = f"{row['agree']:4d} of {row['of']} carry their label  Fréchet distance {row['frechet']:.4f}"
        print(f"{name:{max(map(len, names))}s}  {numbers}")
    if args.out:
        write_json(args.out, found)
    if args.picture:
        save_grid(enlarge_and_frame(np.concatenate(pictures)), CLASSES * PER_CLASS, args.picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
