"""Agreement and Fréchet distance (digits/judge.py) of samples of digits, a picture of them, and a curve of the loss.

    python -m digits.report --samples samples/NAME.npz --out report.json --grid grid.png \\
        --curve exps/digits/log.jsonl curve.png

The manifest beside the npz lists the requested digits, or prompts that name them, under `labels`.
"""

import dataclasses

import numpy as np

from common.errors import exit_on_input_error
from common.files import write_json
from common.flags import flag, parse_flags, required
from common.pictures import save_grid
from digits.data import CLASSES
from digits.judge import build_report, load_samples
from training.plot import save_curves

COLUMNS = 10  # images a row


@dataclasses.dataclass(kw_only=True)
class ReportFlags:
    """Flags of this program."""

    samples: str = required("npz of generate.py or generate_t2i.py; its labels or prompts in the JSON file beside it")
    out: str | None = flag(None, "JSON file to write", str, group="output")
    grid: str | None = flag(None, "picture: ten samples of each class, or prompts", str, group="output", metavar="PNG")
    curve: list | None = flag(None, "log to read, curve to write", str, group="output", nargs=2, metavar=("LOG", "PNG"))


def class_grid(images, digits, columns):
    """uint8 (N, R, R, 3), digits (N,) → (10·columns, R', R', 3): the first of each digit, white where too few.

    R' = 2·R + 4: every pixel is doubled, with a white frame around.
    """
    chosen = np.full((CLASSES, columns, *images.shape[1:]), 255, np.uint8)
    for digit in range(CLASSES):
        rows = images[digits == digit][:columns]
        chosen[digit, : len(rows)] = rows
    larger = chosen.reshape(-1, *images.shape[1:]).repeat(2, axis=1).repeat(2, axis=2)
    return np.pad(larger, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)


def in_words(report, of="samples"):
    """The two numbers of a report as text; of: "samples" or "held_out_digits"."""
    found = report["agreement"][of]
    return f"{found['agree']} of {found['of']} carry their label; Fréchet distance {report['frechet'][of]:.4f}"


def main(argv=None):
    args = parse_flags(ReportFlags, argv, __doc__)
    images, digits, prompts = load_samples(args.samples)
    report = build_report(images, digits)
    print(f"samples: {in_words(report)}\nheld-out digits: {in_words(report, 'held_out_digits')}")
    side = "{images_a_side} images a side, seed {seed}".format(**report["frechet"])
    print(f"(Fréchet distance to the training digits, {side})")
    if args.out:
        write_json(args.out, {"samples": args.samples, **report})
    if args.grid:
        save_grid(images if prompts else class_grid(images, digits, COLUMNS), COLUMNS, args.grid, prompts)
    if args.curve:
        log, picture = args.curve
        save_curves([log], picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
