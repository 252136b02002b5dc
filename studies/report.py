"""Label agreement, Fréchet and kernel distance of 32×32 samples of CIFAR-10's classes, by studies/judge.py.

    python -m studies.report --samples samples/NAME.npz --out report.json
    python -m studies.report --samples samples/NAME.npz --data data/cifar10-source --out report.json

The manifest beside the samples lists their classes under `labels`. With --data, held-out images are measured too, as
many as there are samples: no model should be far below them. The distances are to the training images; they are not
FID and KID, and depend on the number of samples.
"""

import dataclasses

from common.errors import InputError, exit_on_input_error
from common.files import check_writable
from common.flags import flag, parse_early, parse_flags, required
from evaluations.metrics.results import CountedSamples, Result


@dataclasses.dataclass(kw_only=True)
class ReportFlags(CountedSamples):
    samples: str = required("npz, folder or zip of samples", group="data")
    data: str | None = flag(None, "CIFAR-10, for its test/: a folder or zip", str, group="data", metavar="DIR|ZIP")
    judge: str = flag("assets/cifar10-judge", "folder that studies.train_judge made", group="data")
    out: str | None = flag(None, "JSON file to write", str, also=["--json"], group="output")


if __name__ == "__main__":
    parse_early(ReportFlags, __doc__)

from evaluations.metrics.images import read_samples, read_split
from evaluations.metrics.kernel import FEWEST
from studies.judge import CLASSES, RESOLUTION, load_judge, measure

REMEDY = "make the samples with generate.py, of a model of CIFAR-10's classes"


def main(argv=None):
    args = parse_flags(ReportFlags, argv, __doc__)
    if args.out:
        check_writable(args.out, "--out")
    images, labels = read_samples(args, args.samples, RESOLUTION, FEWEST, list[int], REMEDY)
    if wrong := {*labels} - {*range(CLASSES)}:
        raise InputError(f"--samples {args.samples}: label {min(wrong)} is no class of CIFAR-10; {REMEDY}")
    sides, count = {"samples": (images, labels)}, len(labels)
    if args.data:
        sides["held-out images"] = read_split(args.data, "test", RESOLUTION, count)[:2]
    judge = load_judge(args.judge)
    found = {name: measure(*judge, *side) for name, side in sides.items()}
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{metric} {number:.4g}" for metric, number in numbers.items()))
    settings = {"judge": args.judge, "held-out images": found.get("held-out images")}
    Result(found["samples"], args.samples, count=count, settings=settings).write(args.out, "--out")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
