"""ADM's evaluation suite: Inception Score, FID, sFID, precision and recall of images.

    python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz SAMPLES.npz --json results/NAME.json
    torchrun --nproc-per-node 8 evaluations/evaluator.py REF.npz SAMPLES.npz

Both are npz files with images as `arr_0`, uint8 (N, H, W, 3), or folders or zips of images. Statistics in a file (mu,
sigma, mu_s, sigma_s) take the place of those of its images for FID and sFID; precision and recall are between images.
docs/evaluation.md says more.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np
import torch

from common.errors import InputError, exit_on_input_error, note
from common.flags import shown
from common.processes import Processes
from evaluations.metrics.features import extract, load_extractor
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.images import FolderImages, NpzImages, open_images, other_size, read_statistics
from evaluations.metrics.inception import inception_score
from evaluations.metrics.precision_recall import BLOCK, PRECISIONS, precision_recall
from evaluations.metrics.results import result_path, write_result
from training.distributed import set_math

SAMPLES = 50_000  # what published numbers are computed on
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reference", help="npz of reference images, with statistics or without; folder or zip")
    parser.add_argument("samples", help="npz, folder or zip of sampled images")
    add_extractor_flags(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass and process")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float16", help="of precision and recall")
    parser.add_argument("--block", type=int, default=BLOCK, help="rows and columns of a block of distances")
    parser.add_argument("--neighbors", type=int, default=3, help="k of precision and recall")
    help_splits = "number of equal splits of the Inception Score; default: ADM's, of 5,000 images each"
    parser.add_argument("--splits", type=int, help=help_splits)
    return parser.parse_args(argv)


def add_extractor_flags(parser):
    """Flags that both evaluators have."""
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's file; default: its download")
    parser.add_argument("--features", metavar="NAME", help="timm model or TorchScript file in place of InceptionV3")
    parser.add_argument(
        "--sqrtm", action="store_true", help="published arithmetic of the Fréchet distance (scipy's sqrtm)"
    )
    parser.add_argument("--other-size", action="store_true", help="measure against a reference of another resolution")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the result; without FILE results/NAME….json"
    )


@dataclasses.dataclass
class Side:
    """The reference or the samples: images, statistics that the file holds, and what is computed of the images."""

    which: str  # reference or sample
    path: str
    images: NpzImages | FolderImages
    stored: dict | None  # {"pool" or "spatial": (mean, covariance)}
    rows: torch.Tensor = None  # (N, D) float32
    moments: dict = None  # as stored

    @classmethod
    def open(cls, which, path, args):
        images = open_images(path, which.upper())
        if len(images) <= args.neighbors:
            raise InputError(f"{which} {path} holds {len(images)} images; --neighbors {args.neighbors} needs more")
        names = [name for pair in STATISTICS.values() for name in pair]
        stored = read_statistics(path, names) if isinstance(images, NpzImages) else None
        if stored:
            stored = {kind: (stored[mean], stored[cov]) for kind, (mean, cov) in STATISTICS.items()}
        return cls(which, path, images, stored)

    def compute(self, extractor, args, processes):
        """Carry the images through the extractor; stored statistics take the place of computed ones."""
        say(processes, f"computing {self.which} batch activations...")
        share = np.array_split(np.arange(len(self.images)), processes.world)[processes.rank]
        batches = [share[start : start + args.batch_size] for start in range(0, len(share), args.batch_size)]
        running, self.rows = extract(self.images, batches, extractor, processes, keep=True)
        say(processes, f"computing/reading {self.which} batch statistics...")
        stored = {} if args.features else self.stored or {}
        for kind, (mean, _) in stored.items():
            if len(mean) != len(running[kind].mean):
                names = ", ".join(STATISTICS[kind])
                raise InputError(f"{self.path}: {names} are of {len(mean)} features, not {len(running[kind].mean)}")
        self.moments = stored or {kind: statistics.finish() for kind, statistics in running.items()}

    def describe(self, with_stored):
        """Which arrays serve what, in one line."""
        size = "x".join(map(str, self.images.shape[:2]))
        where, whose = (" in arr_0", "its arr_0") if isinstance(self.images, NpzImages) else ("", "them")
        from_what = "mu, sigma, mu_s, sigma_s of the file" if with_stored and self.stored else whose
        return f"{self.which} {self.path}: {len(self.images)} images of {size}{where}; statistics from {from_what}"


def say(processes, text):
    """A line of stdout, once."""
    if processes.rank == 0:
        print(text, flush=True)


def oddities(reference, sample, args):
    """Lines about what may make the numbers differ from published ones. InputError for a reference of another size."""
    found = []
    if sample.stored and not args.features:
        found.append(
            f"{sample.path} holds statistics: FID and sFID are theirs, not its images' (as in ADM's evaluator)"
        )
    if args.features and (sample.stored or reference.stored):
        found.append(f"stored statistics are Inception's and go unused with --features {args.features}")
    if len(sample.images) != SAMPLES:
        found.append(f"{sample.path} holds {len(sample.images)} images; published numbers are of {SAMPLES}")
    sizes = other_size(sample.images, reference.images.shape, args.other_size)
    return [*found, sizes] if sizes else found


def compare(reference, sample, extractor, args, device):
    """{name: number} in the published order. Raises ValueError where one cannot be computed."""
    distances = {
        kind: frechet_distance(*sample.moments[kind], *reference.moments[kind], sqrtm=args.sqrtm)
        for kind in sample.moments
    }
    rows = (reference.rows.to(device), sample.rows.to(device))
    precision, recall = precision_recall(*rows, args.neighbors, args.precision, args.block)
    if args.features:
        name = extractor.name
        return {f"fd_{name}": distances["pool"], f"precision_{name}": precision, f"recall_{name}": recall}
    return {
        "inception_score": inception_score(rows[1], extractor.classifier, splits=args.splits),
        "fid": distances["pool"],
        "sfid": distances["spatial"],
        "precision": precision,
        "recall": recall,
    }


def label(name):
    """A metric's name as ADM's evaluator prints it; those of other features with their extractor."""
    published = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID"}
    kind, _, extractor = name.partition("_")
    kinds = {"fd": "FD", "precision": "Precision", "recall": "Recall"}
    return published.get(name) or kinds[kind] + (f" ({extractor})" if extractor else "")


def evaluate(args):
    """Wire files, extractor and distances; every process takes its share of the images, the first does the rest."""
    processes = Processes.join()
    set_math(allow_tf32=False)
    sides = reference, sample = Side.open("reference", args.reference, args), Side.open("sample", args.samples, args)
    if (args.splits or 1) > len(sample.images):
        raise InputError(f"--splits {args.splits}: {args.samples} holds only {len(sample.images)} images")
    lines, odd = [side.describe(not args.features) for side in sides], oddities(*sides, args)
    extracted_by = f"-{Path(args.features).stem}" if args.features else ""
    result = result_path(args.json, args.samples, extracted_by)
    for line in [*lines, *("warning: " + line for line in odd)]:
        note(line)
    extractor = load_extractor(args.features, args.inception_weights, processes.device)
    for side in sides:
        side.compute(extractor, args, processes)
    if processes.rank == 0:
        say(processes, "Computing evaluations...")
        try:
            metrics = compare(reference, sample, extractor, args, processes.device)
        except ValueError as error:
            raise InputError(f"{args.reference} and {args.samples} cannot be compared: {error}") from None
        for name, value in metrics.items():
            say(processes, f"{label(name)}: {value}")
        if result is not None:
            named = ("precision", "block", "neighbors", "splits", "sqrtm", "batch_size")
            settings = {key: getattr(args, key) for key in named}
            settings.update(features=extractor.name, inception_weights=args.inception_weights)
            arrays = {"reference": args.reference, "arrays": lines, "warnings": odd, "count": len(sample.images)}
            write_result(result, args.samples, metrics, **arrays, settings=settings)
    processes.barrier()
    processes.__exit__()


def main(argv=None):
    args = parse_args(argv)
    for name in ("batch_size", "block", "neighbors", "splits"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"{shown(name)} {getattr(args, name)} must be at least 1")
    evaluate(args)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
