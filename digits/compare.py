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
from common.flags import flag, parse_flags, required
from common.pictures import save_grid
from digits.data import CLASSES
from digits.judge import build_report, load_samples
from digits.report import class_grid, in_words

PER_CLASS = 2


@dataclasses.dataclass(kw_only=True)
class CompareFlags:
    """Flags of this program."""

    samples: list = required("npz files", nargs="+", metavar="NAME=FILE")
    out: str | None = flag(None, "JSON file to write", str, group="output")
    picture: str | None = flag(None, "picture to write: a row of digits per file", str, group="output", metavar="PNG")


def main(argv=None):
    args = parse_flags(CompareFlags, argv, __doc__)
    files, found, pictures = dict(text.split("=", 1) for text in args.samples if "=" in text), {}, []
    if len(files) < len(args.samples):
        raise InputError("--samples: give every file as NAME=FILE, with a name of its own")
    for name, path in files.items():
        images, digits, _ = load_samples(path)
        report = build_report(images, digits)
        counts, frechet = report["agreement"]["samples"], report["frechet"]["samples"]
        share = counts["agree"] / counts["of"]
        found[name] = {"samples": path, **counts, "agreement": share, "frechet": frechet}
        pictures.append(class_grid(images, digits, PER_CLASS))
        print(f"{name}: {in_words(report)}")
    if args.out:
        write_json(args.out, found)
    if args.picture:
        save_grid(np.concatenate(pictures), CLASSES * PER_CLASS, args.picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
