"""The two numbers of digits/judge.py for samples of prompts, whose digit is read from the prompt; and a picture.

python -m digits.prompts --samples samples/NAME.npz --out report.json --grid grid.png
"""

import dataclasses

import numpy as np

from common.errors import exit_on_input_error
from common.flags import flag, parse_flags, required
from common.pictures import save_grid
from digits.captions import digit_of
from digits.judge import load_samples, print_report
from evaluations.metrics.results import sample_labels

COLUMNS = 10


@dataclasses.dataclass(kw_only=True)
class PromptFlags:
    """Flags of this program."""

    samples: str = required("npz of generate_t2i.py; prompts in the JSON file beside it")
    out: str | None = flag(None, "JSON file to write", str, group="output")
    grid: str | None = flag(None, "picture to write: every image above its prompt", str, group="output", metavar="PNG")


def main(argv=None):
    args = parse_flags(PromptFlags, argv, __doc__)
    images = load_samples(args.samples)
    prompts = sample_labels(args.samples, str, len(images), "make the samples with generate_t2i.py")
    print_report(args.samples, images, np.array([digit_of(prompt) for prompt in prompts]), args.out)
    if args.grid:
        save_grid(images, COLUMNS, args.grid, prompts)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
