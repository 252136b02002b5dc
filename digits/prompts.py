"""The two numbers of digits_report.py for samples of prompts, whose digit is read from the prompt; and a picture.

python evaluations/digits_prompts.py --samples samples/NAME.npz --out report.json --grid grid.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.pictures import save_grid
from digits.captions import digit_of
from digits.report import build_report, describe, load_samples
from evaluations.clip_score import read_prompts

COLUMNS = 10


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", required=True, help="npz of generate_t2i.py; prompts in the JSON file beside it")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--grid", metavar="PNG", help="picture to write: every image above its prompt")
    args = parser.parse_args(argv)
    images, prompts = load_samples(args.samples), read_prompts(args.samples)
    if len(images) != len(prompts):
        raise InputError(f"--samples {args.samples}: {len(prompts)} prompts for {len(images)} images; sample again")
    report = build_report(images, np.array([digit_of(prompt) for prompt in prompts]))
    print(describe(report))
    if args.out:
        write_json(args.out, {"samples": str(args.samples), **report})
    if args.grid:
        save_grid(images, COLUMNS, args.grid, prompts)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
