"""Handwritten digits as real images that come with a dependency: scikit-learn's 1,797 scans of 8×8 pixels.

    python -m digits.data --dest data/digits/raw --held-out data/digits/held-out

writes the training digits as an image folder, one subfolder per class, and the held-out digits as another, for
--holdout. Letters: N images, R resolution.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import InputError, exit_on_input_error
from common.files import whole_folder
from common.flags import flag, parse_flags, required
from latents.names import walk
from latents.rows import BadImageError
from preprocessing.sources import decode
from preprocessing.transforms import center_crop_dhariwal

CLASSES = 10
RESOLUTION = 32  # of the images that the VAE, the flow model and the report work on
HELD_OUT_PER_CLASS = 40  # equal per class, as the labels of the samples they are compared with


@dataclasses.dataclass(frozen=True)
class Digits:
    """Grey uint8 images (N, 8, 8) in 0..255, int64 labels (N,) in 0..9, indices (N,) in the data set, ascending."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def take(self, rows):
        """The digits of these rows, given as indices or a mask."""
        return Digits(self.images[rows], self.labels[rows], self.indices[rows])


def load_digits_split():
    """(train, held_out): 1,397 and 400 digits, 40 of each class held out; the same on every machine."""
    from sklearn.datasets import load_digits  # slow to import

    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)  # from 0..16
    digits = Digits(images, source.target.astype(np.int64), np.arange(len(images)))
    # numpy's legacy generator is frozen for good; scikit-learn's own splitter may change, and with it what is held out
    permutation = np.random.RandomState(0).permutation
    chosen = [permutation(np.flatnonzero(digits.labels == label))[:HELD_OUT_PER_CLASS] for label in range(CLASSES)]
    held = np.isin(digits.indices, chosen)
    return digits.take(~held), digits.take(held)


def upsample(images):
    """Grey (N, 8, 8) uint8 → RGB (N, 32, 32, 3) uint8, the bytes that `dataset_tools.py convert` makes of the PNGs."""
    pictures = (Image.fromarray(image).convert("RGB") for image in images)
    return np.stack([np.asarray(center_crop_dhariwal(picture, RESOLUTION, RESOLUTION)) for picture in pictures])


def write_image_folder(digits, dest, name="--dest"):
    """Write 8×8 RGB PNGs DEST/CLASS/INDEX.png; False when they are all there already. Raises InputError.

    name: the flag that gave DEST.
    """
    dest = Path(dest)
    names = (f"{label}/{index:04d}.png" for label, index in zip(digits.labels, digits.indices, strict=True))
    pictures = dict(zip(names, digits.images, strict=True))
    found = {name for name, _ in walk(dest)} if dest.is_dir() else set()
    others = [name for name in found if name not in pictures or not shows(dest / name, pictures[name])]
    if found == pictures.keys() and not others:
        return False
    if found or dest.is_file():
        fault = f"is a file, or holds other or damaged ones ({min(others, default='and lacks some')})"
        raise InputError(f"{name} {dest} {fault}; name a new folder")
    with whole_folder(dest, name) as partial:
        for name, image in pictures.items():
            (partial / name).parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert("RGB").save(partial / name)
    return True


def shows(path, image):
    """Whether a file is the picture of a grey image (8, 8)."""
    try:
        return np.array_equal(decode(path.read_bytes()), image[..., None].repeat(3, axis=-1))
    except BadImageError:
        return False


@dataclasses.dataclass
class DigitsFlags:
    dest: str = required("image folder to make, with one subfolder per class")
    held_out: str | None = flag(None, "image folder to make of the held-out digits", str, metavar="DIR")


def main(argv=None):
    args = parse_flags(DigitsFlags, argv, __doc__)
    train, held_out = load_digits_split()
    if args.held_out:
        write_image_folder(held_out, args.held_out, "--held-out")
    state = "wrote" if write_image_folder(train, args.dest) else "already there:"
    where = f" in {args.held_out}" if args.held_out else ""
    print(f"{state} {len(train.labels)} digits in {args.dest} ({len(held_out.labels)} more are held out{where})")
    convert = "python -m preprocessing.dataset_tools convert --resolution 32x32"
    print(f"next: {convert} --source {args.dest} --dest DATA/images")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
