"""FID and FD-DINOv2 of images (a folder, a zip or an npz) as EDM2 and Decoupled MeanFlow compute them.

    python evaluations/calculate_metrics.py calc --images samples/NAME --ref imgnet256.pkl
    python evaluations/calculate_metrics.py ref --data data/imagenet256/images --dest imagenet256.pkl
    torchrun --nproc-per-node 8 evaluations/calculate_metrics.py calc --images ... --ref ... --num-images 50000

References: a pickle {num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}, or ADM's npz, whose mu and sigma give FID.
Those that `ref` makes also hold `image_size`, so that images of another size are not compared with them by mistake.
"""

import argparse
import io
import pickle
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np

from common.errors import InputError, exit_on_input_error, note
from common.files import check_writable, named_full_disk, write_atomically
from common.flags import shown
from common.processes import Processes
from evaluations.evaluator import add_extractor_flags, say
from evaluations.metrics.features import extract, load_dinov2, load_features
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.images import NpzImages, check_moments, open_images, other_size, read_statistics
from evaluations.metrics.inception import Inception
from evaluations.metrics.results import result_path, write_result
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
    """({metric: {mu, sigma}}, (H, W) of its images or None) of a .pkl or .npz. Raises InputError."""
    if "://" in str(path):
        raise InputError(f"--ref {path}: download the file first and name the copy")
    if str(path).endswith(".npz"):
        found = read_statistics(path, ("mu", "sigma"))
        if found is None:
            raise InputError(f"--ref {path} holds no mu and sigma; make a reference of its images with `ref`")
        return {"fid": found}, reference_size(path)
    try:
        content = NumpyUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise InputError(f"--ref {path} does not exist") from None
    except Exception as error:  # the bytes of a damaged pickle decide what fails
        raise InputError(f"--ref {path} cannot be read as a pickle of statistics ({error}); copy it again") from None
    content = content if isinstance(content, dict) else {}
    metrics = {name: value for name, value in content.items() if name not in ("num_images", "image_size")}
    for name, value in metrics.items():
        if not isinstance(value, dict) or not {"mu", "sigma"} <= value.keys():
            raise InputError(f"--ref {path}: its {name} has no mu and sigma; make the reference again")
        check_moments(np.asarray(value["mu"]), np.asarray(value["sigma"]), f"--ref {path}: mu, sigma of {name}")
    if not metrics:
        raise InputError(f"--ref {path} holds no statistics; make the reference again")
    return metrics, content.get("image_size")


def reference_size(path):
    """(H, W) of the images that ADM's npz holds beside its statistics, None of one without images."""
    with np.load(path) as file:
        return NpzImages(path, "--ref").shape[:2] if "arr_0" in file.files else None


def metric_names(text):
    """Names of a --metrics list. Raises InputError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise InputError(f'Invalid metric "{unknown[0]}"; --metrics takes {", ".join(METRICS)}')
    return names


def load_detectors(names, args, processes):
    """{metric: extractor} of these metrics and --features."""
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
        raise InputError("--metrics leaves nothing to measure; name a metric that the reference has, or --features")
    return detectors


def load_images(path, flag, processes, num=None, seed=0):
    """Images, and the indices of those that are measured: `num` of them, all where it is None. Raises InputError."""
    say(processes, f"Loading images from {path} ...")
    images = open_images(path, flag)
    if num is not None and len(images) < num:
        raise InputError(f"{flag} {path}: Found {len(images)} images, but expected at least {num}; see --num")
    indices = choose_subset(len(images), num, seed)
    if len(indices) < 2:
        raise InputError(f"{flag} {path}: statistics need at least 2 images, not {len(indices)}")
    return images, indices


def calculate_statistics(images, indices, detectors, batch_size, processes):
    """{metric: (mean, covariance)} of the images `indices`."""
    say(processes, "Calculating feature statistics...")

    def all_features(batch):
        return {name: detector(batch)["pool"] for name, detector in detectors.items()}

    shares = split_batches(indices, batch_size, processes.world, processes.rank)
    batches = [batch for batch in shares if len(batch)]
    statistics, _ = extract(images, batches, all_features, processes)
    return {name: statistics[name].finish() for name in detectors}


def compare(statistics, reference, args, processes):
    """{metric: Fréchet distance} of {metric: (mean, covariance)} and {metric: {mu, sigma}}, printed as EDM2 does."""
    metrics = {}
    for name, (mean, covariance) in statistics.items():
        say(processes, f"Calculating {name}...")
        other = reference[name]
        try:
            metrics[name] = frechet_distance(mean, covariance, other["mu"], other["sigma"], sqrtm=args.sqrtm)
        except ValueError as error:
            raise InputError(f"--ref {args.ref} does not fit {name}: {error}") from None
        say(processes, f"{name} = {metrics[name]:g}")
    return metrics


def present(names, reference, processes):
    """Those of the metrics that the reference has; a line says which are left out."""
    for name in names:
        if name not in reference:
            say(processes, f"No statistics computed for {name} -- skipping.")
    return [name for name in names if name in reference]


def calc(args, processes):
    """Distances of --images to --ref, printed as EDM2 does; what the reference lacks is not computed."""
    say(processes, f"Loading feature statistics from {args.ref} ...")
    reference, size = read_reference(args.ref)
    result = result_path(args.json, args.images, "-edm2")
    images, indices = load_images(args.images, "--images", processes, args.num, args.seed)
    line = other_size(images, size, args.other_size)
    if line and processes.rank == 0:
        note(f"warning: {line}")
    detectors = load_detectors(present(metric_names(args.metrics), reference, processes), args, processes)
    kept = present(detectors, reference, processes)
    if not kept:
        raise InputError(f"--ref {args.ref} holds {', '.join(reference)} and none of {', '.join(detectors)}")
    detectors = {name: detectors[name] for name in kept}
    statistics = calculate_statistics(images, indices, detectors, args.batch, processes)
    if processes.rank > 0:
        return
    metrics = compare(statistics, reference, args, processes)
    if result is not None:
        names = ("num", "seed", "batch", "sqrtm", "inception_weights", "features")
        settings = {name: getattr(args, name) for name in names}
        write_result(result, args.images, metrics, reference=args.ref, count=len(indices), settings=settings)


def ref(args, processes):
    """Statistics of --data, written to --dest."""
    check_writable(args.dest, "--dest")
    images, indices = load_images(args.data, "--data", processes)
    detectors = load_detectors(metric_names(args.metrics), args, processes)
    statistics = calculate_statistics(images, indices, detectors, args.batch, processes)
    if processes.rank == 0:
        about = {"num_images": len(indices), "image_size": images.shape[:2]}
        content = {name: {"mu": mean, "sigma": covariance} for name, (mean, covariance) in statistics.items()}
        with named_full_disk(args.dest):
            write_atomically(args.dest, lambda file: pickle.dump({**about, **content}, file))
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
    processes = Processes.join()
    set_math(allow_tf32=False)
    args.run(args, processes)
    processes.barrier()
    processes.__exit__()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
