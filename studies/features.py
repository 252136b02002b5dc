"""Write the features of CIFAR-10's judge (studies/judge.py) for images of a data folder: a small encoder to probe with.

python -m studies.features --source DATA/images --dest DATA/features-cifar10_cnn
python -m evaluations.probe --ckpt CKPT --data-dir DATA --out results/probe
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

from common.errors import InputError, exit_on_input_error
from common.files import locked, sha256_of_files
from common.flags import flag, parse_early, parse_flags
from preprocessing.options import ImageFlags, NetworkFlags


@dataclasses.dataclass
class JudgeFeatureFlags(NetworkFlags, ImageFlags):
    device: ClassVar = "cpu"  # fast enough
    mirror: ClassVar = False
    judge: str = flag("assets/cifar10-judge", "folder that studies.train_judge made", group="model")


if __name__ == "__main__":
    parse_early(JudgeFeatureFlags, __doc__)

from common.processes import Processes
from preprocessing.fill import ImageRows, fill, ticket
from preprocessing.jobs import Job
from preprocessing.packed import ShardWriter
from studies.judge import NAME, RESOLUTION, WIDTHS, find_judge, load_judge


def write_features(options):
    """Write a packed set with one row (1, D) per image. Raises InputError."""
    rows = ImageRows(options)
    if rows.side != RESOLUTION:
        raise InputError(f"--source {options.source} holds images of {rows.side} pixels; the judge needs {RESOLUTION}")
    judge, _ = load_judge(options.judge)
    with Processes.join(options.device) as processes:
        encoder = {"name": NAME, "weights": sha256_of_files(find_judge(options.judge))}
        what = {"kind": "features", "encoder": encoder, "flipped": False}
        job = Job(options.dest, ticket("features", rows, options, {**what, **options.stored()}), rows.made_from)
        writer = ShardWriter(job, (1, WIDTHS[-1]), options)
        fill(writer, rows, lambda images: judge.judge(images.permute(0, 2, 3, 1))[0][:, None], processes, what, "torch")


def main(argv=None):
    options = parse_flags(JudgeFeatureFlags, argv, __doc__)
    with locked(options.dest, "--dest"):
        write_features(options)
    print(f"next: python -m evaluations.probe --ckpt CKPT --data-dir {Path(options.dest).parent} --out results/probe")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
