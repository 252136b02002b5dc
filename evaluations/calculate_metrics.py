"""FID and FD-DINOv2 of images (a folder, a zip or an npz) as EDM2 and Decoupled MeanFlow compute them.

    python -m evaluations.calculate_metrics calc --images samples/NAME --ref imgnet256.pkl
    python -m evaluations.calculate_metrics ref --data data/imagenet256/images --dest imagenet256.pkl
    torchrun --nproc-per-node 8 -m evaluations.calculate_metrics calc --images ... --ref ... --num-images 50000

References: a pickle {num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}, or ADM's npz, whose mu and sigma give FID.
Those that `ref` makes also hold `image_size`, so that images of another size are not compared with them by mistake.
"""

import dataclasses
import pickle

from common.errors import InputError, exit_on_input_error, note, say
from common.files import check_writable, write_atomically
from common.flags import BATCH, SEED, Range, flag, parse_commands, parse_early, required
from evaluations.metrics.results import AFTER_CHECK, BATCHES, SPEED, MeasureFlags, NetworkFlags, Result, SampleFlags


@dataclasses.dataclass(kw_only=True)
class MetricFlags(NetworkFlags):
    metrics: str = flag("fid,fd_dinov2", "comma list of fid, fd_dinov2", group="features", empty=True)
    dinov2_weights: str | None = flag(None, "the authors' file; default: timm's", str, group="features", metavar="FILE")
    batch: int = flag(64, "largest batch", range=BATCH, group=SPEED, name=BATCHES, also=["--batch-size"])


@dataclasses.dataclass(kw_only=True)
class CalcFlags(MetricFlags, MeasureFlags):
    """distances between images and a reference"""

    images: str = required("folder, zip or npz", metavar="PATH")
    ref: str = required(".pkl, or .npz with mu and sigma", metavar="FILE")
    # torchrun takes EDM2's --num for an abbreviation of its own --numa-binding, wherever it stands
    num: int = flag(
        50_000, "images to draw", range=Range(2), name="--num-images", also=["--num-fid-samples", "--num-samples"]
    )
    seed: int = flag(0, "seed of the draw", range=SEED)


@dataclasses.dataclass(kw_only=True)
class RefFlags(MetricFlags, SampleFlags):
    """make a reference"""

    data: str = required("folder, zip or npz", metavar="PATH")
    dest: str = required(".pkl to write", metavar="FILE")


COMMANDS = {"calc": CalcFlags, "ref": RefFlags}


if __name__ == "__main__":
    parse_early(COMMANDS, __doc__)

import numpy as np

from common.precision import set_math
from common.processes import Processes
from evaluations.metrics import features
from evaluations.metrics.frechet import frechet_distance
from evaluations.metrics.images import open_images
from evaluations.metrics.inception import Inception
from evaluations.metrics.references import other_size, read_reference

RESIZE = "torch's (bicubic, antialiased), as EDM2; Stein et al., whom the DeepFlow paper's Table 6 cites, use Pillow's"
SETTINGS = ("num", "seed", "batch", "sqrtm", "inception_weights", "dinov2_weights", "features")  # kept in the result


def choose_subset(count, num=None, seed=0):
    """Ascending indices of `num` of `count` images, drawn as EDM2 does; all of them where num is None."""
    return np.sort(np.random.RandomState(seed % (1 << 31)).permutation(count)[:num])


def split_batches(indices, batch_size, world=1, rank=0):
    """This process's batches, near equal in size: EDM2's rule. One may be empty."""
    number = max((len(indices) - 1) // (batch_size * world) + 1, 1) * world
    return np.array_split(indices, number)[rank::world]


def open_networks(args, device, known=None, size=None):
    """The extractor, batch → {metric: features}, of --metrics and --features, for images of `size`, (H, W) or None.

    known: {metric: (mean, covariance)} of --ref; metrics that it lacks are skipped with a message.
    """
    loaders = {
        "fid": ("InceptionV3", lambda: Inception(args.inception_weights, device)),
        "fd_dinov2": ("DINOv2", lambda: features.load_dinov2(args.dinov2_weights, device)),
    }
    names = [name.strip() for name in args.metrics.split(",") if name.strip()]
    if unknown := [name for name in names if name not in loaders]:
        raise InputError(f'Invalid metric "{unknown[0]}"; --metrics takes {", ".join(loaders)}')
    if args.features:
        if f"fd_{args.extractor}" in loaders:
            fault = f"--features {args.features}: its result would be named fd_dinov2, as DINOv2's is"
            raise InputError(f"{fault}; rename the file")
        names.append(f"fd_{args.extractor}")
        loaders[names[-1]] = (args.features, lambda: features.load_features(args.features, device))
    networks = {}
    for name in names:
        if known is not None and name not in known:
            say(f"No statistics computed for {name} -- skipping.")
            continue
        what, load = loaders[name]
        say(f"Setting up {what}...")
        networks[name] = load()
    if not networks:
        raise InputError("--metrics leaves nothing to measure; name a metric that the reference has, or --features")

    def extractor(batch):
        return {name: network(batch)["pool"] for name, network in networks.items()}

    if known is not None:
        features.check_widths(extractor, size or (256, 256), device, known, f"--ref {args.ref}")
    return extractor


def load_images(args, path, flag, needed):
    """(Images, accepted faults). Raises InputError if there are too few, or fewer than their manifest says."""
    say(f"Loading images from {path} ...")
    images = open_images(path, flag)
    if len(images) < needed:
        raise InputError(f"{flag} {path}: Found {len(images)} images, but expected at least {needed}")
    return images, args.check_count(path, len(images))


def calculate_statistics(images, indices, extractor, batch_size, processes):
    """{metric: (mean, covariance)} of the images `indices`."""
    say("Calculating feature statistics...")
    batches = split_batches(indices, batch_size, processes.world, processes.rank)
    statistics, _ = features.extract(images, batches, extractor, processes)
    return {name: running.finish() for name, running in statistics.items()}


def calc(args, processes):
    """Distances of --images to --ref, printed as EDM2 does; what the reference lacks is not computed."""
    say(f"Loading feature statistics from {args.ref} ...")
    reference, size = read_reference(args.ref)
    path = args.result_path(args.images, "-edm2")
    if args.check_only:
        open_networks(args, processes.device, reference, size)
        return say(f"{args.ref}: reference and networks are ready\n{AFTER_CHECK}")
    images, accepted = load_images(args, args.images, "--images", args.num)
    if line := other_size(images, size, args.other_size):
        note(f"warning: {line}")
        accepted.append(line)
    extractor = open_networks(args, processes.device, reference, images.shape[:2])
    indices = choose_subset(len(images), args.num, args.seed)
    note(f"{len(indices)} of the {len(images)} images are measured")
    statistics = calculate_statistics(images, indices, extractor, args.batch, processes)
    if not processes.is_main:
        return
    metrics = {}
    for name, moments in statistics.items():
        say(f"Calculating {name}...")
        try:
            metrics[name] = frechet_distance(*moments, *reference[name], sqrtm=args.sqrtm)
        except ValueError as error:
            raise InputError(f"--ref {args.ref} does not fit {name}: {error}") from None
        say(f"{name} = {metrics[name]:g}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if "fd_dinov2" in metrics:
        settings["fd_dinov2_resize"] = RESIZE
        note(f"fd_dinov2: the resize is {RESIZE}")
    about = {"reference": args.ref, "warnings": accepted, "count": len(indices), "settings": settings}
    Result(metrics, args.images, **about).write(path)


def ref(args, processes):
    """Statistics of --data, written to --dest."""
    if args.dest.endswith(".npz"):  # `calc` would take it for ADM's
        raise InputError(f"--dest {args.dest} is written as a pickle; use a name that ends in .pkl")
    check_writable(args.dest, "--dest")
    (images, _), extractor = load_images(args, args.data, "--data", 2), open_networks(args, processes.device)
    statistics = calculate_statistics(images, choose_subset(len(images)), extractor, args.batch, processes)
    if processes.is_main:
        content = {"num_images": len(images), "image_size": images.shape[:2]}
        content |= {name: {"mu": mean, "sigma": covariance} for name, (mean, covariance) in statistics.items()}
        write_atomically(args.dest, lambda file: pickle.dump(content, file))
        say(f"wrote {args.dest}: statistics of {len(images)} images")
        say(f"next: python -m evaluations.calculate_metrics calc --images SAMPLES --ref {args.dest}")


def main(argv=None):
    command, args = parse_commands(COMMANDS, argv, __doc__)
    with Processes.join() as processes:
        set_math(allow_tf32=False)
        {"calc": calc, "ref": ref}[command](args, processes)
        processes.barrier()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
