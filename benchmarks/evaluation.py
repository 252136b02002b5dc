"""Speed and memory of the evaluation: feature extraction in images/s, and seconds for each number from features.

    python -m benchmarks.evaluation                          # 50,000 samples against 10,000 references, 2048 features
    python -m benchmarks.evaluation --samples 2000 --references 1000 --images 0

Features are random, with norms like InceptionV3's; the network has random weights. Nothing is downloaded.
"""

import dataclasses
import os
import platform
import resource
import time
from unittest import mock

import torch

from benchmarks.timing import describe_machine, installed, synchronize
from common.errors import exit_on_input_error
from common.flags import Range, flag, parse_flags
from common.precision import set_math
from common.processes import Processes
from evaluations.metrics.features import extract
from evaluations.metrics.frechet import RunningStatistics, frechet_distance
from evaluations.metrics.inception import Inception, inception_score
from evaluations.metrics.kernel import kernel_distance
from evaluations.metrics.precision_recall import PRECISIONS, precision_recall
from models import hub

TARGET = 300  # seconds for all distances of 50,000 against 10,000, on two CPU cores


@dataclasses.dataclass(kw_only=True)
class BenchmarkFlags:
    """Flags of this program."""

    samples: int = flag(50_000, "rows of the samples", range=Range(4), group="data")
    references: int = flag(10_000, "rows of the reference", range=Range(4), group="data")
    width: int = flag(2048, "features per image", range=Range(1), group="data")
    images: int = flag(256, "images to carry through InceptionV3; 0 for none", range=Range(0), group="data")
    resolution: int = flag(256, "their side", range=Range(1), group="data")
    precision: list = flag(
        ("float16", "float32"),
        "of precision and recall",
        str,
        group="precision and speed",
        nargs="+",
        choices=list(PRECISIONS),
    )
    batch_size: int = flag(64, "images of a forward pass", range=Range(1), group="precision and speed")


class RandomImages:
    """Images of noise in place of a file."""

    path = "random images"

    def __init__(self, resolution):
        self.shape = (resolution, resolution, 3)

    def batches(self, batches):
        for indices in batches:
            yield torch.randint(0, 256, (len(indices), *self.shape), dtype=torch.uint8).numpy()


class Rows:
    """Timed steps: (what, seconds, memory at the end)."""

    def __init__(self, device):
        self.device, self.rows = device, []

    def time(self, what, run):
        """Run and note; returns what it returns."""
        synchronize()
        start = time.perf_counter()
        result = run()
        synchronize()
        self.rows.append((what, time.perf_counter() - start))
        print(f"| {what} | {self.rows[-1][1]:.1f} | {self.memory():.2f} |", flush=True)
        return result

    def memory(self):
        """Peak GB so far: of the GPU where there is one, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def random_inception(device):
    """InceptionV3 with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3

    download = mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url")
    with mock.patch.object(hub, "answers"), download, mock.patch.object(torch.nn.Module, "load_state_dict"):
        return Inception(device=device)


def features_like_inceptions(count, width, seed):
    """Non-negative features (N, D) with mean square norm of some hundreds."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return rows.add_(0.2).clamp_(min=0).mul_(0.7)


def measure_extraction(args, processes, rows):
    """Images through the network, in images/s."""
    extractor = random_inception(processes.device)
    batches = torch.arange(args.images).split(args.batch_size)
    extract(RandomImages(args.resolution), batches[:1], extractor, processes)
    count = sum(map(len, batches))
    rows.time(f"features of {count} images of {args.resolution}²",
              lambda: extract(RandomImages(args.resolution), batches, extractor, processes, keep=True))  # fmt: skip
    print(f"\n{count / rows.rows[-1][1]:.1f} images/s\n")


def running_statistics(features, batch_size, device):
    statistics = RunningStatistics(features.shape[1], device)
    for part in features.split(batch_size):
        statistics.add(part)
    return statistics.finish()


def measure_distances(args, processes, rows):
    """Every number of the evaluator, from features."""
    device = processes.device
    reference = features_like_inceptions(args.references, args.width, 1).to(device)
    sample = features_like_inceptions(args.samples, args.width, 2).to(device)
    spatial = [features[:, : min(2023, args.width)] for features in (reference, sample)]
    classifier = torch.randn(args.width, 1008, generator=torch.Generator().manual_seed(3)).to(device) * 0.05
    print("| what | seconds | peak memory (GB) |\n|---|---|---|")
    for name, pair in (("FID", (reference, sample)), ("sFID", spatial)):
        what = f"statistics for {name}, batches of {args.batch_size}"
        moments = rows.time(what, lambda pair=pair: [running_statistics(f, args.batch_size, device) for f in pair])
        rows.time(name, lambda moments=moments: frechet_distance(*moments[1], *moments[0]))
    rows.time("Inception Score", lambda: inception_score(sample, classifier))
    rows.time("KID", lambda: kernel_distance(reference, sample))
    for precision in args.precision:
        rows.time(
            f"precision and recall, {precision}", lambda p=precision: precision_recall(reference, sample, precision=p)
        )
    total = sum(seconds for _, seconds in rows.rows[:7])
    print(f"\nall, precision and recall in {args.precision[0]}: {total:.1f} s", end="")
    full = (args.samples, args.references, args.width) == (50_000, 10_000, 2048)
    print(f" (target: under {TARGET} s on two CPU cores)" if full else "")


def main():
    args = parse_flags(BenchmarkFlags, description=__doc__)
    with Processes.join() as processes:
        set_math(allow_tf32=False)
        rows = Rows(processes.device)
        print(f"{describe_machine()}, load {os.getloadavg()[0]:.1f}\n")
        measure_distances(args, processes, rows)
        if args.images and not installed("torch_fidelity"):
            print("features of images: torch-fidelity is not installed")
        elif args.images:
            measure_extraction(args, processes, rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
