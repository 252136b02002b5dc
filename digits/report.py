"""Two numbers for samples of handwritten digits, beside the same two for held-out real digits; needs no download.

    python evaluations/digits_report.py --samples samples/digits.npz --out report.json --grid grid.png \\
        --curve exps/digits/log.jsonl curve.png

1. Agreement: how often a classifier trained on the real training digits finds the requested label.
2. Fréchet distance to the training digits in a small feature space (see `fit_features`).

The npz holds `arr_0`, uint8 (N, 32, 32, 3); the JSON file beside it (same name) lists the requested labels under
`labels`. Letters: N images, D = 64 pixels of an 8×8 image, K dimensions of the feature space.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs from anywhere

import numpy as np
import sklearn
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from common.errors import InputError, exit_on_input_error
from common.files import write_json
from common.pictures import save_class_grid
from digits.data import CLASSES, RESOLUTION, load_digits_split, upsample
from evaluations.metrics.frechet import frechet_distance, statistics
from training.plot import save_curves

MAX_COUNT = 400  # images a side of the Fréchet distance: as many as there are held-out digits
MIN_ACCURACY = 0.95  # of the classifier on held-out digits; a worse one is no judge
FEATURES = 32
SEED = 0


def pixels(images):
    """uint8 (N, 32, 32, 3) → grey 8×8 pixels in 0..1, float64 (N, 64): the mean of every 4×4 block."""
    side = RESOLUTION // 8
    blocks = images.astype(np.float64).mean(axis=-1).reshape(-1, 8, side, 8, side)
    return blocks.mean(axis=(2, 4)).reshape(-1, 64) / 255


def train_classifier(train, held_out):
    """(classifier, its accuracy on the held-out digits): an RBF support vector machine on pairs of (pixels, labels).

    Raises InputError when it is right on less than 95 % of them.
    """
    classifier = SVC().fit(*train)
    accuracy = classifier.score(*held_out)
    if accuracy < MIN_ACCURACY:
        raise InputError(
            f"the classifier is right on only {accuracy:.1%} of the held-out digits, {MIN_ACCURACY:.0%} is needed; "
            f"try another release of scikit-learn (this is {sklearn.__version__})"
        )
    return classifier, accuracy


def fit_features(train_pixels):
    """Function pixels (N, 64) → features (N, 32): principal components of the real training digits, in pixel units.

    32 of the 64 directions hold 97 % of the variance. The rest, mostly pixels that are always black, would make the
    covariance of 400 images nearly singular; whitening would give noise the weight of shape.
    """
    return PCA(FEATURES, svd_solver="full").fit(train_pixels).transform


def stratified_rows(labels, count, seed=SEED):
    """`count` row numbers, ascending, as evenly over the classes as the labels (N,) allow; random within a class."""
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=int)  # place of a row among those of its class
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        rank[rows] = np.arange(len(rows))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:count])


def load_samples(path):
    """Images of an npz, uint8 (N, 32, 32, 3). Raises InputError naming the file."""
    try:
        with np.load(path) as file:
            images = file["arr_0"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile):
        raise InputError(f"--samples {path}: cannot read member arr_0 of an npz; make it with generate.py") from None
    if images.dtype != np.uint8 or images.shape[1:] != (RESOLUTION, RESOLUTION, 3) or len(images) < 2:
        raise InputError(
            f"--samples {path}: arr_0 is {images.dtype} {images.shape}, "
            f"not uint8 (N, {RESOLUTION}, {RESOLUTION}, 3) with N of at least 2"
        )
    return images


def load_labels(samples_path, count):
    """Requested labels (count,) from the JSON manifest beside the npz. Raises InputError naming the file."""
    path = Path(samples_path).with_suffix(".json")
    try:
        labels = json.loads(path.read_text())["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: no list of requested labels under the key 'labels' beside the samples") from None
    if not isinstance(labels, list) or len(labels) != count:
        raise InputError(f"{path}: 'labels' must list one label for each of the {count} samples")
    if not all(type(label) is int and 0 <= label < CLASSES for label in labels):
        raise InputError(f"{path}: 'labels' must be integers from 0 to {CLASSES - 1}")
    return np.array(labels)


def agreement(classifier, images, labels):
    """How many of the images the classifier gives their label, as a dict with the count of each class."""
    right = classifier.predict(pixels(images)) == labels
    of_class = {str(c): f"{right[labels == c].sum()} of {(labels == c).sum()}" for c in range(CLASSES)}
    return {"agree": int(right.sum()), "of": len(labels), "by_class": of_class}


def build_report(images, labels):
    """Both numbers for samples (N, 32, 32, 3) with requested labels (N,), and for the held-out digits, as a dict."""
    train, held_out = load_digits_split()
    train_images, held_images = upsample(train.images), upsample(held_out.images)
    train_set, held_set = (pixels(train_images), train.labels), (pixels(held_images), held_out.labels)
    classifier, accuracy = train_classifier(train_set, held_set)
    features, count = fit_features(train_set[0]), min(len(images), MAX_COUNT)

    def fitted(pictures, classes):
        return statistics(features(pixels(pictures[stratified_rows(classes, count)])))

    real = fitted(train_images, train.labels)
    return {
        "agreement": {
            "samples": agreement(classifier, images, labels),
            "held_out_digits": agreement(classifier, held_images, held_out.labels),
            "classifier": "SVC (RBF) on 8x8 pixels of the training digits",
            "classifier_accuracy": accuracy,
        },
        "frechet": {
            "samples": frechet_distance(*fitted(images, labels), *real),
            "held_out_digits": frechet_distance(*fitted(held_images, held_out.labels), *real),
            "reference": "training digits",
            "images_a_side": count,
            "features": f"first {FEATURES} principal components of 8x8 pixels in 0..1",
            "seed": SEED,
        },
        "versions": {"numpy": np.__version__, "scikit-learn": sklearn.__version__},
    }


def describe(report):
    """The report as the lines that people read."""
    lines, frechet = [], report["frechet"]
    for key, name in (("samples", "samples"), ("held_out_digits", "held-out digits")):
        a = report["agreement"][key]
        lines.append(f"{name}: {a['agree']} of {a['of']} carry their label; Fréchet distance {frechet[key]:.4f}")
    lines.append(f"(Fréchet distance to the training digits, {frechet['images_a_side']} images a side, seed {SEED})")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure samples of digits, beside held-out real digits.")
    parser.add_argument("--samples", required=True, help="npz with arr_0; labels in the JSON file of the same name")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--grid", metavar="PNG", help="picture to write: ten samples of each class, a class a row")
    parser.add_argument("--curve", nargs=2, metavar=("LOG", "PNG"), help="JSONL log to read, loss curve to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    images = load_samples(args.samples)
    labels = load_labels(args.samples, len(images))
    report = {"samples": str(args.samples), **build_report(images, labels)}
    print(describe(report))
    if args.out:
        write_json(args.out, report)
    if args.grid:
        save_class_grid(images, labels, args.grid)
    if args.curve:
        log, picture = args.curve
        save_curves([log], picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
