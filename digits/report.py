"""Agreement and Fréchet distance (digits/judge.py) of samples of digits, a picture of them, and a curve of the loss.

    python -m digits.report --samples samples/digits.npz --out report.json --grid grid.png \\
        --curve exps/digits/log.jsonl curve.png

The npz holds `arr_0`, uint8 (N, 32, 32, 3); its manifest lists the requested labels under `labels`.
"""

import dataclasses

import numpy as np

from common.errors import InputError, exit_on_input_error
from common.flags import flag, parse_flags, required
from common.pictures import save_grid
from digits.data import CLASSES
from digits.judge import load_samples, print_report
from digits.pictures import class_grid, enlarge_and_frame
from evaluations.metrics.results import sample_labels
from sampling.manifest import manifest_path
from training.plot import save_curves

COLUMNS = 10  # samples of a class in the picture


@dataclasses.dataclass(kw_only=True)
class ReportFlags:
    """Flags of this program."""

    samples: str = required("npz with arr_0; labels in the JSON file of the same name")
    out: str | None = flag(None, "JSON file to write", str, group="output")
    grid: str | None = flag(
        None, "picture to write: ten samples of each class, a class a row", str, group="output", metavar="PNG"
    )
    curve: list | None = flag(
        None, "JSONL log to read, loss curve to write", str, group="output", nargs=2, metavar=("LOG", "PNG")
    )


def load_labels(path, count):
    """Requested labels (count,) beside the samples. Raises InputError naming the file."""
    labels = np.array(sample_labels(path, int, count, "make the samples with generate.py"))
    if not ((labels >= 0) & (labels < CLASSES)).all():
        raise InputError(f"{manifest_path(path)}: 'labels' must be from 0 to {CLASSES - 1}; sample digits")
    return labels


def main(argv=None):
    args = parse_flags(ReportFlags, argv, __doc__)
    images = load_samples(args.samples)
    labels = load_labels(args.samples, len(images))
    print_report(args.samples, images, labels, args.out)
    if args.grid:
        save_grid(enlarge_and_frame(class_grid(images, labels, CLASSES, COLUMNS)), COLUMNS, args.grid)
    if args.curve:
        log, picture = args.curve
        save_curves([log], picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
