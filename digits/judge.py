"""The judge of samples of digits: two numbers, beside the same two for held-out real digits; needs no download.

1. Agreement: how often a classifier trained on the real training digits finds the requested label.
2. Fréchet distance to the training digits in a small feature space (see `fit_features`).

Letters: N images, D = 64 pixels of an 8×8 image, K dimensions of the feature space.
"""

import numpy as np
import sklearn
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from common.errors import InputError
from digits.captions import digit_of
from digits.data import CLASSES, RESOLUTION, load_digits_split, upsample
from evaluations.metrics.frechet import frechet_distance, statistics
from evaluations.metrics.images import NpzImages
from evaluations.metrics.results import sample_labels
from sampling.manifest import manifest_path

MAX_COUNT = 400  # images a side of the Fréchet distance: as many as there are held-out digits
MIN_ACCURACY = 0.95  # of the classifier on held-out digits; a worse one is no judge
FEATURES = 32
SEED = 0


def load_samples(path):
    """(images, uint8 (N, 32, 32, 3), their digits (N,), their prompts or None) of an npz and the manifest beside it.

    The digit of a sample is its label, or what its prompt names. Raises InputError naming the file.
    """
    source, side = NpzImages(path, "--samples"), RESOLUTION
    if source.shape != (side, side, 3) or len(source) < 2:
        shape = (len(source), *source.shape)
        raise InputError(f"--samples {path}: arr_0 is uint8 {shape}, not (N, {side}, {side}, 3) with N of at least 2")
    labels = sample_labels(path, (int, str), len(source), "make the samples with generate.py or generate_t2i.py")
    digits = np.array([digit_of(str(label), f"{manifest_path(path)}: label") for label in labels])
    (images,) = source.batches([np.arange(len(source))])
    return images, digits, labels if isinstance(labels[0], str) else None


def pixels(images):
    """uint8 (N, 32, 32, 3) → grey 8×8 pixels in 0..1, float64 (N, 64): the mean of every 4×4 block."""
    side = RESOLUTION // 8
    blocks = images.astype(np.float64).mean(axis=-1).reshape(-1, 8, side, 8, side)
    return blocks.mean(axis=(2, 4)).reshape(-1, 64) / 255


def train_classifier(train, held_out):
    """(classifier of pixels, its accuracy on the held-out digits): an RBF support vector machine on training Digits.

    Raises InputError when it is right on less than 95 % of them.
    """
    classifier = SVC().fit(pixels(upsample(train.images)), train.labels)
    accuracy = classifier.score(pixels(upsample(held_out.images)), held_out.labels)
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


def agreement(classifier, images, labels):
    """How many of the images the classifier gives their label, as a dict with the count of each class."""
    right = classifier.predict(pixels(images)) == labels
    of_class = {str(c): f"{right[labels == c].sum()} of {(labels == c).sum()}" for c in range(CLASSES)}
    return {"agree": int(right.sum()), "of": len(labels), "by_class": of_class}


def build_report(images, labels):
    """Both numbers for samples (N, 32, 32, 3) with requested labels (N,), and for the held-out digits, as a dict."""
    train, held_out = load_digits_split()
    train_images, held_images = upsample(train.images), upsample(held_out.images)
    classifier, accuracy = train_classifier(train, held_out)
    features, count = fit_features(pixels(train_images)), min(len(images), MAX_COUNT)

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
