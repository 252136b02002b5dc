"""ADM's evaluation suite: Inception Score, FID, sFID, precision and recall of images; and KID.

    python -m evaluations.evaluator VIRTUAL_imagenet256_labeled.npz SAMPLES.npz --json results/NAME.json
    torchrun --nproc-per-node 8 -m evaluations.evaluator REF.npz SAMPLES.npz

Both are npz files with images as `arr_0`, uint8 (N, H, W, 3), or folders or zips of images. Statistics in a file (mu,
sigma, mu_s, sigma_s) take the place of those of its images for FID and sFID; all else is measured on the images.
docs/evaluation.md says more.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError, exit_on_input_error, note, say
from common.flags import BATCH, Range, flag, parse_early, parse_flags, required
from evaluations.metrics.results import AFTER_CHECK, BATCHES, LABELS, OTHER, SPEED, MeasureFlags, Result, label

PRECISIONS = ["float16", "float32", "float64"]


@dataclasses.dataclass(kw_only=True)
class EvaluatorFlags(MeasureFlags):
    reference: str = required("npz of reference images, with statistics or without; folder or zip", positional=True)
    samples: str = required("npz, folder or zip of sampled images", positional=True)
    batch_size: int = flag(64, "images per forward pass and process", range=BATCH, group=SPEED, name=BATCHES)
    precision: str = flag("float16", "arithmetic of precision and recall", group="distances", choices=PRECISIONS)
    block: int = flag(10_000, "rows and columns of a block of distances", range=BATCH, group="distances")
    neighbors: int = flag(3, "k of precision and recall", range=Range(1), group="distances")
    splits: int | None = flag(None, "of the Inception Score; default: of 5,000", int, range=Range(1), group="distances")


if __name__ == "__main__":
    parse_early(EvaluatorFlags, __doc__)

import numpy as np

from common.precision import set_math
from common.processes import Processes
from evaluations.metrics.features import check_widths, extract, load_features
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.images import NpzImages, open_images
from evaluations.metrics.inception import Inception, inception_score
from evaluations.metrics.kernel import FEWEST, kernel_distance
from evaluations.metrics.precision_recall import precision_recall
from evaluations.metrics.references import other_size, read_statistics

SAMPLES = 50_000  # what published numbers are computed on
SPLIT = 5_000  # images per split in ADM's Inception Score
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Side:
    """The reference or the samples: images, statistics {kind: (mean, covariance)} of the file or {}, and features."""

    def __init__(self, which, path, args):
        self.which, self.path, self.images = which, path, open_images(path, which.upper())
        if len(self.images) <= args.neighbors:
            raise InputError(f"{which} {path} holds {len(self.images)} images; --neighbors {args.neighbors} needs more")
        of_inception = isinstance(self.images, NpzImages) and not args.features
        self.stored = read_statistics(path, STATISTICS) if of_inception else {}

    def batches(self, args, processes):
        """Arrays of indices of this process's images, one per batch."""
        share = np.array_split(np.arange(len(self.images)), processes.world)[processes.rank]
        return np.split(share, range(args.batch_size, len(share), args.batch_size))

    def compute(self, extractor, args, processes):
        """Run the images through the extractor; stored statistics take the place of computed ones."""
        say(f"computing {self.which} batch activations...")
        running, self.rows = extract(self.images, self.batches(args, processes), extractor, processes, keep=True)
        say(f"computing/reading {self.which} batch statistics...")
        self.moments = self.stored or {kind: statistics.finish() for kind, statistics in running.items()}

    def __str__(self):
        size = "x".join(map(str, self.images.shape[:2]))
        source = "mu, sigma, mu_s, sigma_s of the file" if self.stored else "them"
        return f"{self.which} {self.path}: {len(self.images)} images of {size}; statistics from {source}"


def oddities(reference, sample, args):
    """Lines about what may make the numbers differ from published ones. InputError for a reference of another size."""
    path, count = sample.path, len(sample.images)
    lines = [other_size(sample.images, reference.images.shape, args.other_size)]
    if sample.stored:
        lines.append(f"{path} holds statistics: FID and sFID use them instead of its images (as in ADM's evaluator)")
    if count != SAMPLES:
        lines.append(f"{path} holds {count} images; published numbers use {SAMPLES}")
    if count > SPLIT and count % SPLIT and not (args.splits or args.features):
        last = f"the last {count % SPLIT} images weigh as much in the Inception Score as {SPLIT} others"
        lines.append(f"{last}; --splits makes equal splits")
    if min(count, len(reference.images)) < FEWEST:
        lines.append(f"the kernel distance is left out: it needs {FEWEST} images a side")
    return list(filter(None, lines))


def compare(reference, sample, extractor, args, device):
    """{name: number} in the published order, KID last. Raises ValueError where one cannot be computed."""
    pairs = [(*sample.moments[kind], *reference.moments[kind]) for kind in sample.moments]
    numbers = [frechet_distance(*pair, sqrtm=args.sqrtm) for pair in pairs]
    rows = (reference.rows.to(device), sample.rows.to(device))
    numbers += precision_recall(*rows, args.neighbors, args.precision, args.block)
    numbers += kernel_distance(*rows) if min(map(len, rows)) >= FEWEST else []
    if args.features:
        return dict(zip([f"{kind}_{extractor.name}" for kind in OTHER], numbers, strict=False))
    numbers.insert(0, inception_score(rows[1], extractor.classifier, SPLIT, args.splits))
    return dict(zip(LABELS, numbers, strict=False))


def open_network(args, sides, device):
    """The extractor of --features, by default InceptionV3. Raises InputError if stored statistics do not fit it."""
    extractor = load_features(args.features, device) if args.features else Inception(args.inception_weights, device)
    for side in sides:
        check_widths(extractor, side.images.shape[:2], device, side.stored, f"{side.which} {side.path}")
    return extractor


def check_inputs(args, processes):
    """Read the whole reference and load the network, without samples. Raises InputError."""
    args.result_path("samples")
    reference = Side("reference", args.reference, args)
    open_network(args, [reference], processes.device)
    for _ in reference.images.batches(reference.batches(args, processes)):
        pass
    say(f"{reference}: ready to measure samples")


def evaluate(args, processes):
    """Wire files, extractor and distances; every process takes its share of the images, the first does the rest."""
    sides = reference, sample = Side("reference", args.reference, args), Side("sample", args.samples, args)
    accepted = args.check_count(args.samples, len(sample.images))
    if (args.splits or 1) > len(sample.images):
        raise InputError(f"--splits {args.splits}: {args.samples} holds only {len(sample.images)} images")
    lines, odd = [str(side) for side in sides], oddities(*sides, args)
    path = args.result_path(args.samples, f"-{Path(args.extractor).name}" if args.features else "")
    note("\n".join([*lines, *(f"warning: {line}" for line in odd)]))
    extractor = open_network(args, sides, processes.device)
    for side in sides:
        side.compute(extractor, args, processes)
    if not processes.is_main:
        return
    say("Computing evaluations...")
    try:
        metrics = compare(reference, sample, extractor, args, processes.device)
    except ValueError as error:
        raise InputError(f"{args.reference} and {args.samples} cannot be compared: {error}") from None
    for name, value in metrics.items():
        say(f"{label(name, extractor.name)}: {value}")
    kept = ("precision", "block", "neighbors", "splits", "sqrtm", "batch_size")
    settings = {name: getattr(args, name) for name in kept}
    settings |= {"features": extractor.name, "inception_weights": args.inception_weights}
    about = {"reference": args.reference, "arrays": lines, "warnings": [*accepted, *odd], "count": len(sample.images)}
    Result(metrics, args.samples, **about, settings=settings).write(path)


def main(argv=None):
    args = parse_flags(EvaluatorFlags, argv, __doc__)
    with Processes.join() as processes:
        set_math(allow_tf32=False)
        if args.check_only:
            check_inputs(args, processes)
            say(AFTER_CHECK)
        else:
            evaluate(args, processes)
        processes.barrier()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
