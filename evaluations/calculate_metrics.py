"""FID and FD-DINOv2 of images (a folder, a zip or an npz) as EDM2 and Decoupled MeanFlow compute them.

    python evaluations/calculate_metrics.py calc --images samples/NAME --ref imgnet256.pkl
    python evaluations/calculate_metrics.py ref --data data/imagenet256/images --dest imagenet256.pkl
    torchrun --nproc-per-node 8 evaluations/calculate_metrics.py calc --images ... --ref ... --num-images 50000

References: a pickle {num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}, or ADM's npz, whose mu and sigma give FID.
"""

import argparse
import io
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np

from evaluations.evaluator import add_extractor_flags, say
from evaluations.features import extract, load_dinov2, load_features
from evaluations.frechet import frechet_distance
from evaluations.images import check_moments, open_images, read_statistics
from evaluations.inception import Inception
from evaluations.processes import ProcessGroup
from evaluations.results import result_path, write_result
from models.errors import InputError, exit_on_input_error
from training.checkpoint import check_writable, write_atomically
from training.config import shown
from training.distributed import set_math

METRICS = ("fid", "fd_dinov2")
FEATURES = "fd_"  # a metric of --features NAME is called fd_NAME


def choose_subset(count, num=None, seed=0):
    """Ascending indices of `num` of `count` images, drawn as EDM2 does; all of them where num is None."""
    if num is None or num >= count:
        return np.arange(count)
    order = np.arange(count)
    np.random.RandomState(seed % (1 << 31)).shuffle(order)
    return np.sort(order[:num])


def split_batches(indices, batch_size, world=1, rank=0):
    """This process's batches, near equal in size: EDM2's rule. One may be empty."""
    number = max((len(indices) - 1) // (batch_size * world) + 1, 1) * world
    return np.array_split(indices, number)[rank::world]


class NumpyUnpickler(pickle.Unpickler):
    """Unpickler that knows the few names that arrays and numbers of numpy need, and refuses all others."""

    CORE = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"  # renamed in numpy 2
    ARRAYS = re.compile(r"numpy\._?core\.(multiarray (_reconstruct|scalar)|numeric _frombuffer)")
    OTHERS = ("numpy ndarray", "numpy dtype", "_codecs encode")  # the last: old protocols write bytes as text

    def find_class(self, module, name):
        if self.ARRAYS.fullmatch(f"{module} {name}"):
            module = f"{self.CORE}.{module.rsplit('.', 1)[1]}"
        elif f"{module} {name}" not in self.OTHERS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not loaded: it could run code")
        return super().find_class(module, name)


def read_reference(path):
    """{metric: {mu, sigma}} of a .pkl or .npz. Raises InputError."""
    if "://" in str(path):
        raise InputError(f"--ref {path}: download the file first and name the copy")
    if str(path).endswith(".npz"):
        found = read_statistics(path, ("mu", "sigma"))
        if found is None:
            raise InputError(f"--ref {path} holds no mu and sigma; make a reference of its images with `ref`")
        return {"fid": found}
    try:
        content = NumpyUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise InputError(f"--ref {path} does not exist") from None
    except Exception as error:  # the bytes of a damaged pickle decide what fails
        raise InputError(f"--ref {path} cannot be read as a pickle of statistics ({error}); copy it again") from None
    metrics = (
        {name: value for name, value in content.items() if name != "num_images"} if isinstance(content, dict) else {}
    )
    for name, value in metrics.items():
        if not isinstance(value, dict) or not {"mu", "sigma"} <= value.keys():
            raise InputError(f"--ref {path}: its {name} has no mu and sigma; make the reference again")
        check_moments(np.asarray(value["mu"]), np.asarray(value["sigma"]), f"--ref {path}: mu, sigma of {name}")
    if not metrics:
        raise InputError(f"--ref {path} holds no statistics; make the reference again")
    return metrics


def load_detectors(args, processes):
    """{metric: extractor} of --metrics and --features."""
    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(f'Invalid metric "{unknown[0]}"; --metrics takes {", ".join(METRICS)}')
    detectors = {}
    for name in names:
        say(processes, f"Setting up {'InceptionV3' if name == 'fid' else 'DINOv2'}...")
        if name == "fid":
            detectors[name] = Inception(args.inception_weights, processes.device, spatial=False)
        else:
            detectors[name] = load_dinov2(args.dinov2_weights, processes.device)
    if args.features:
        say(processes, f"Setting up {args.features}...")
        extractor = load_features(args.features, processes.device)
        detectors[FEATURES + extractor.name] = extractor
    if not detectors:
        raise InputError("--metrics is empty and no --features is given; name one")
    return detectors


def calculate_statistics(path, flag, args, processes, num=None, seed=0):
    """({metric: (mean, covariance)}, number of images measured)."""
    say(processes, f"Loading images from {path} ...")
    images = open_images(path, flag)
    if num is not None and len(images) < num:
        raise InputError(f"{flag} {path}: Found {len(images)} images, but expected at least {num}; see --num")
    indices = choose_subset(len(images), num, seed)
    if len(indices) < 2:
        raise InputError(f"{flag} {path}: statistics need at least 2 images, not {len(indices)}")
    detectors = load_detectors(args, processes)
    say(processes, "Calculating feature statistics...")

    def all_features(batch):
        return {name: detector(batch)["pool"] for name, detector in detectors.items()}

    shares = split_batches(indices, args.batch, processes.world, processes.rank)
    batches = [batch for batch in shares if len(batch)]
    statistics, _ = extract(images, batches, all_features, processes)
    return {name: statistics[name].finish() for name in detectors}, len(indices)


def calc(args, processes):
    """Distances of --images to --ref, printed as EDM2 does; returns {metric: number}."""
    say(processes, f"Loading feature statistics from {args.ref} ...")
    reference = read_reference(args.ref)
    result = result_path(args.json, args.images, "-edm2")
    statistics, count = calculate_statistics(args.images, "--images", args, processes, args.num, args.seed)
    if processes.rank > 0:
        return
    metrics = {}
    for name, (mean, covariance) in statistics.items():
        say(processes, f"Calculating {name}...")
        if name not in reference:
            say(processes, f"No statistics computed for {name} -- skipping.")
            continue
        other = reference[name]
        try:
            metrics[name] = frechet_distance(mean, covariance, other["mu"], other["sigma"], sqrtm=args.sqrtm)
        except ValueError as error:
            raise InputError(f"--ref {args.ref} does not fit {name}: {error}") from None
        say(processes, f"{name} = {metrics[name]:g}")
    if not metrics:
        raise InputError(f"--ref {args.ref} holds {', '.join(reference)} and none of {', '.join(statistics)}")
    if result is not None:
        settings = {
            key: getattr(args, key) for key in ("num", "seed", "batch", "sqrtm", "inception_weights", "features")
        }
        write_result(result, args.images, metrics, reference=args.ref, count=count, settings=settings)


def ref(args, processes):
    """Statistics of --data, written to --dest."""
    check_writable(args.dest, "--dest")
    statistics, count = calculate_statistics(args.data, "--data", args, processes)
    if processes.rank == 0:
        content = {name: {"mu": mean, "sigma": covariance} for name, (mean, covariance) in statistics.items()}
        write_atomically(args.dest, lambda file: pickle.dump({"num_images": count, **content}, file))
        say(processes, f"wrote {args.dest}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("calc", help="distances between images and a reference", allow_abbrev=False)
    one.add_argument("--images", required=True, metavar="PATH", help="folder, zip or npz")
    one.add_argument("--ref", required=True, metavar="FILE", help=".pkl, or .npz with mu and sigma")
    # torchrun takes --num for an abbreviation of its own --numa-binding, wherever it stands
    help_num = "images to measure, drawn where there are more; under torchrun write --num-images"
    one.add_argument("--num", "--num-images", type=int, default=50_000, help=help_num)
    one.add_argument("--seed", type=int, default=0, help="of that draw")
    one.set_defaults(run=calc)
    other = commands.add_parser("ref", help="make a reference", allow_abbrev=False)
    other.add_argument("--data", required=True, metavar="PATH", help="folder, zip or npz")
    other.add_argument("--dest", required=True, metavar="FILE", help=".pkl to write")
    other.set_defaults(run=ref, num=2, seed=0)
    for command in (one, other):
        command.add_argument("--metrics", default=",".join(METRICS), help="comma list of " + ", ".join(METRICS))
        command.add_argument("--batch", type=int, default=64, help="largest batch of a process")
        command.add_argument("--dinov2-weights", metavar="FILE", help="the authors' file; default: timm's download")
        add_extractor_flags(command)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for name, least in (("batch", 1), ("num", 2), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"{shown(name)} {getattr(args, name)} must be at least {least}")
    processes = ProcessGroup.start()
    set_math(allow_tf32=False)
    args.run(args, processes)
    processes.barrier()
    processes.stop()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
