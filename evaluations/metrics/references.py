"""What images are compared with: statistics in a pickle or an npz, and the size of the images they are of."""

import codecs
import io
import pickle
import zipfile

import numpy as np

from common.errors import InputError, note
from common.files import read_bytes, regular
from common.records import check_record
from evaluations.metrics.images import READ_ERRORS, NpzImages, unreadable

MAKERS = [value.__reduce_ex__(protocol)[0] for value in (np.empty(1), np.float64()) for protocol in (2, 5)]
# encode: old protocols write bytes as text
KNOWN = {found.__name__: found for found in (np.ndarray, np.dtype, codecs.encode, *MAKERS)}


class NumpyUnpickler(pickle.Unpickler):
    """Unpickler that knows what numpy's arrays and numbers need, in any version's modules, and refuses all else."""

    def find_class(self, module, name):
        if name not in KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not loaded: it could run code")
        return KNOWN[name]


def read_reference(path):
    """({metric: (mean, covariance)}, (H, W) of its images or None) of a .pkl or .npz. Raises InputError."""
    if str(path).endswith(".npz"):
        metrics = read_statistics(path, {"fid": ("mu", "sigma")})
        with zipfile.ZipFile(path) as archive:
            size = NpzImages(path, "--ref").shape[:2] if "arr_0.npy" in archive.namelist() else None
    else:
        data = io.BytesIO(read_bytes(path, "download the file first, or make it with `ref`"))
        try:
            content = dict(NumpyUnpickler(data).load())
        except Exception as error:  # the bytes of a damaged pickle decide what fails
            raise InputError(f"--ref {path} cannot be read as a dict of statistics ({error}); copy it again") from None
        kept, count = content.pop("image_size", None), content.pop("num_images", None)
        size = check_record(tuple[int, int] | None, kept, f"--ref {path}: image_size", "make it again with `ref`")
        known = isinstance(count, int | np.integer)
        note(f"--ref {path}: statistics of {count if known else 'an unknown number of'} images")
        metrics = {name: moments(value, "mu", "sigma", f"--ref {path}: {name}") for name, value in content.items()}
    if not metrics:
        raise InputError(f"--ref {path} holds no statistics; make a reference of its images with `ref`")
    return metrics, size


def read_statistics(path, members):
    """{kind: (mean, covariance)} of an npz by {kind: names of both}; {} of one without. Raises InputError."""
    try:
        with np.load(regular(path), allow_pickle=False) as file:
            found = {name: file[name] for pair in members.values() for name in pair if name in file.files}
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    return {kind: moments(found, *names, path) for kind, names in members.items()} if found else {}


def moments(held, mean, covariance, where):
    """Two named arrays of a dict as float64: a mean (D,) and a covariance (D, D). Raises InputError."""
    if not isinstance(held, dict) or not {mean, covariance} <= held.keys():
        raise InputError(f"{where} does not hold both {mean} and {covariance}; take a whole reference file")
    try:
        mu, sigma = (np.asarray(held[name], np.float64) for name in (mean, covariance))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {mean} or {covariance} is not numeric ({error}); copy it again") from None
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        shapes = f"{mean} {mu.shape} and {covariance} {sigma.shape}"
        raise InputError(f"{where}: {shapes} are not finite (D,) and (D, D); take another reference")
    if not np.allclose(sigma, sigma.T, atol=1e-6 * np.abs(sigma).max(initial=0)):
        raise InputError(f"{where}: {covariance} is not symmetric, so the file is damaged; copy it again")
    return mu, sigma


def other_size(images, size, allowed):
    """A line if images differ in size from the reference, (H, W, …) or None; InputError if not `allowed`."""
    if size is None or tuple(size[:2]) == tuple(images.shape[:2]):
        return None
    line = "samples of {}x{} are compared with a reference of {}x{}".format(*images.shape[:2], *size[:2])
    if not allowed:
        raise InputError(f"{line}; take the reference of that size, or pass --other-size")
    return line
