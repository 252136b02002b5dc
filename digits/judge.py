"""The judge of samples of digits: two numbers, beside the same two for held-out real digits; needs no download.

1. Agreement: how often a classifier trained on the real training digits finds the requested label.
2. Fréchet distance to the training digits in a small feature space (see `fit_features`).

Letters: N images, D = 64 pixels of an 8×8 image, K dimensions of the feature space.
"""

import zipfile

import numpy as np
import sklearn
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from common.errors import InputError
from common.files import write_json
from digits.data import CLASSES, RESOLUTION, load_digits_split, upsample
from evaluations.metrics.frechet import frechet_distance, statistics

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


def print_report(path, images, labels, out=None):
    """Judge the images (N, 32, 32, 3) of a file by their labels (N,): print the numbers, write them to `out`."""
    report = build_report(images, labels)
    print(describe(report))
    if out:
        write_json(out, {"samples": path, **report})
