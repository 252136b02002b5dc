"""The judge of samples of digits: two numbers, beside the same two for held-out real digits; needs no download.

1. Agreement: how often a classifier trained on the real training digits finds the requested label.
2. Fréchet distance to the training digits in a small feature space; of 800 samples and more the mean over sets of 400.
"""

import numpy as np

from common.versions import versions
from digits.data import RESOLUTION, load_digits_split, upsample
from evaluations.metrics.frechet import frechet_distance, statistics

MAX_COUNT = 400  # images a side of the Fréchet distance: as many as there are held-out digits
FEATURES = 32
SEED = 0


def pixels(images):
    """uint8 (N, 32, 32, 3) → grey 8×8 pixels in 0..1, float64 (N, 64): the mean of every 4×4 block."""
    side = RESOLUTION // 8
    blocks = images.astype(np.float64).mean(axis=-1).reshape(-1, 8, side, 8, side)
    return blocks.mean(axis=(2, 4)).reshape(-1, 64) / 255


def train_classifier(train):
    """Classifier of pixels: an RBF support vector machine."""
    from sklearn.svm import SVC

    return SVC().fit(pixels(upsample(train.images)), train.labels)


def stratified_rows(labels, count, seed=SEED):
    """`count` row numbers, ascending, as evenly over the classes as the labels (N,) allow; random within a class."""
    order = np.random.RandomState(seed).permutation(len(labels))
    classes = labels[order, None] == np.unique(labels)  # (N, number of classes), rows in that order
    rank = classes.cumsum(axis=0)[classes]  # rank of a row within its class
    return np.sort(order[np.argsort(rank, kind="stable")][:count])


def build_report(images, labels):
    """Both numbers for samples (N, 32, 32, 3) with requested labels (N,), and for the held-out digits, as a dict."""
    from sklearn.decomposition import PCA  # slow to import

    train, held_out = load_digits_split()
    train_images, count = upsample(train.images), min(len(images), MAX_COUNT)
    classifier = train_classifier(train)
    # 32 of the 64 components hold 97 % of the variance. The rest, mostly pixels that are always black, would make the
    # covariance of 400 images nearly singular; whitening would give noise the weight of shape.
    features = PCA(FEATURES, svd_solver="full").fit(pixels(train_images)).transform

    def agreement(pictures, classes):
        return {"agree": int((classifier.predict(pixels(pictures)) == classes).sum()), "of": len(classes)}

    def fitted(pictures, classes):
        return statistics(features(pixels(pictures[stratified_rows(classes, count)])))

    def distance(pictures, classes):
        sets = np.array_split(np.arange(len(pictures)), max(1, len(pictures) // MAX_COUNT))
        return float(np.mean([frechet_distance(*fitted(pictures[rows], classes[rows]), *real) for rows in sets]))

    real = fitted(train_images, train.labels)
    judged = {"samples": (images, labels), "held_out_digits": (upsample(held_out.images), held_out.labels)}
    frechet = {name: distance(*digits) for name, digits in judged.items()}
    return {
        "agreement": {name: agreement(*digits) for name, digits in judged.items()},
        "frechet": {**frechet, "images_a_side": count, "seed": SEED},
        "versions": versions("scikit-learn"),
    }
